// What is known of a compiled kernel before it runs.
#pragma once

#include <string>
#include <vector>

namespace fastattn {

struct Kernel {
  std::string name;  // as in the source, with its template arguments
  int threads;       // of a block
  int shared_bytes;  // of a block, dynamic
};

}  // namespace fastattn
