// What was found, one line each:
//
//   race: byte 96 of shared memory is read after thread 3 wrote it, with no barrier between, at a.cu:12
//     (kernel f, block 0, thread 40; 96 times)
//
// Findings of one kind at one place are one report, that of the first; the others are counted.
#include <dlfcn.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <map>
#include <tuple>

#include "machine.h"

extern char** environ;

namespace fastattn::emulator {
namespace {

constexpr size_t MOST_REPORTS = 100;

struct Report {
  std::string kind, what, where_in_grid;
  Site site;
  int64_t times;
};

using Key = std::tuple<std::string, const char*, int, const void*>;
std::vector<Report> reports;
std::map<Key, size_t> report_of;
int64_t left_out;

// What addr2line prints for a code address of this library. The functions inlined there come first, one file:line each.
std::string run_addr2line(const void* address) {
  Dl_info library;
  if (!dladdr(address, &library)) return "";
  char offset[32];
  std::snprintf(offset, sizeof offset, "%#zx",
                static_cast<size_t>(static_cast<const char*>(address) - static_cast<const char*>(library.dli_fbase)) -
                    1);  // within the call
  const char* command[] = {"addr2line", "-i", "-e", library.dli_fname, offset, nullptr};
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return "";
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
  posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
  pid_t child;
  bool started = posix_spawnp(&child, command[0], &actions, nullptr, const_cast<char**>(command), environ) == 0;
  posix_spawn_file_actions_destroy(&actions);
  close(ends[1]);
  std::string output;
  char buffer[4096];
  for (ssize_t n; started && (n = read(ends[0], buffer, sizeof buffer)) > 0;) output.append(buffer, static_cast<size_t>(n));
  close(ends[0]);
  if (started) waitpid(child, nullptr, 0);
  return output;
}

// The first line that is the kernel's and not the emulator's.
std::string source_line(const void* address) {
  std::string output = run_addr2line(address);
  for (size_t start = 0, end; (end = output.find('\n', start)) != std::string::npos; start = end + 1) {
    std::string line = output.substr(start, end - start);
    line = line.substr(0, line.find(" (discriminator"));
    if (line.find("/emulator/emulator.h:") == std::string::npos && line.compare(0, 2, "??") != 0) return line;
  }
  char text[32];
  std::snprintf(text, sizeof text, "%p", address);
  return text;
}

}  // namespace

std::string line_of(Site site) {
  if (site.address) return source_line(site.address);
  return std::string(site.file) + ":" + std::to_string(site.line);
}

void report(const char* kind, Site site, const char* format, ...) {
  auto [known, is_new] = report_of.try_emplace({kind, site.file, site.line, site.address}, reports.size());
  if (!is_new) {
    reports[known->second].times++;
    return;
  }
  if (reports.size() == MOST_REPORTS) {
    report_of.erase(known);
    left_out++;
    return;
  }
  char what[1000];
  va_list values;
  va_start(values, format);
  std::vsnprintf(what, sizeof what, format, values);
  va_end(values);
  std::string where;
  if (machine.running)
    where = std::string("kernel ") + machine.kernel + ", block " + std::to_string(machine.block) + ", thread " +
            std::to_string(machine.thread);
  reports.push_back({kind, what, where, site, 1});
}

}  // namespace fastattn::emulator

using namespace fastattn::emulator;

// Ends a session: the reports since the last, a line each; valid until the next call. Views, reports and a launch that was
// abandoned are forgotten.
extern "C" __attribute__((visibility("default"))) const char* fastattn_emulator_finish() {
  static std::string text;
  if (!machine.abandoned) check_unwritten();
  text.clear();
  for (const Report& r : reports) {
    text += r.kind + ": " + r.what;
    if (r.site.line || r.site.address) text += ", at " + line_of(r.site);
    if (!r.where_in_grid.empty()) {
      text += " (" + r.where_in_grid;
      if (r.times > 1) text += "; " + std::to_string(r.times) + " times";
      text += ")";
    }
    text += "\n";
  }
  if (left_out) text += "and more: " + std::to_string(left_out) + " findings at other places\n";
  reports.clear();
  report_of.clear();
  left_out = 0;
  forget_views();
  machine.abandoned = false;
  if (machine.clock > UINT32_MAX / 2) {
    forget_accesses();
    machine.clock = 0;
  }
  return text.c_str();
}
