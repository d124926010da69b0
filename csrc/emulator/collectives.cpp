// What the 32 lanes of a warp do together. Each lane leaves a pointer to its operands, on its own stack, and waits; the last to
// arrive computes the results of all and writes them there. Fragment layouts are those of the PTX ISA.
#include <utility>

#include "machine.h"

namespace fastattn::emulator {

int current_lane() { return machine.thread % LANES; }

void require_whole_warp(const Warp& warp) {
  if (!warp.exited) return;
  report("divergent", warp.site, "%s waits for 32 lanes, but lane %d has left the kernel", warp.collective,
         __builtin_ctz(warp.exited));
  abandon();
}

void meet(const char* collective, Site site, void* operands, bool (*execute)(Warp&)) {
  Warp& warp = current_warp();
  if (!warp.arrived) {
    warp.collective = collective;
    warp.site = site;
  } else if (warp.collective != collective || warp.site.line != site.line || warp.site.file != site.file) {
    report("divergent", site, "%s, while lane %d of the warp waits in %s at %s", collective, __builtin_ctz(warp.arrived),
           warp.collective, line_of(warp.site).c_str());
    abandon();
  }
  warp.operands[current_lane()] = operands;
  warp.arrived |= 1u << current_lane();
  require_whole_warp(warp);
  if (warp.arrived == ALL_LANES) {
    warp.arrived = 0;
    if (execute(warp)) return wake(warp);
  }
  wait_for_wake(collective, site);
}

namespace {

template <class Operands>
Operands& operands_of(const Warp& warp, int lane) {
  return *static_cast<Operands*>(warp.operands[lane]);
}

struct Exchange {
  uint64_t mine, theirs;
  int source_lane;
};

struct Vote {
  bool predicate;
  uint32_t ballot;
};

struct Matrices {
  uint32_t* r;
  const unsigned char* row;
  int count;
  bool transposed;
};

struct Product {
  float* d;
  const uint32_t *a, *b;
};

bool execute_exchange(Warp& warp) {
  for (int lane = 0; lane < LANES; lane++) {
    Exchange& exchange = operands_of<Exchange>(warp, lane);
    exchange.theirs = operands_of<Exchange>(warp, exchange.source_lane).mine;
  }
  return true;
}

bool execute_vote(Warp& warp) {
  uint32_t ballot = 0;
  for (int lane = 0; lane < LANES; lane++) ballot |= static_cast<uint32_t>(operands_of<Vote>(warp, lane).predicate) << lane;
  for (int lane = 0; lane < LANES; lane++) operands_of<Vote>(warp, lane).ballot = ballot;
  return true;
}

bool execute_ldmatrix(Warp& warp) {
  for (int lane = 0; lane < LANES; lane++) {
    const Matrices& mine = operands_of<Matrices>(warp, lane);
    for (int i = 0; i < mine.count; i++) {
      uint16_t elements[2];
      for (int e = 0; e < 2; e++) {
        int row = lane / 4, column = lane % 4 * 2 + e;
        if (mine.transposed) std::swap(row, column);
        std::memcpy(&elements[e], operands_of<Matrices>(warp, 8 * i + row).row + 2 * column, 2);
      }
      mine.r[i] = elements[0] | static_cast<uint32_t>(elements[1]) << 16;
    }
  }
  return true;
}

// d (16 x 8) += a (16 x K) b (K x 8), the products one after another in fp32. A GPU adds them in an order of its own.
template <int K>
void multiply(Warp& warp, const float (&a)[16][K], const float (&b)[K][8]) {
  for (int row = 0; row < 16; row++) {
    float* half_row[4];  // lane 4 (row % 8) + i holds columns 2 i and 2 i + 1
    float sum[8];
    for (int i = 0; i < 4; i++) {
      half_row[i] = operands_of<Product>(warp, row % 8 * 4 + i).d + row / 8 * 2;
      sum[2 * i] = half_row[i][0];
      sum[2 * i + 1] = half_row[i][1];
    }
    for (int k = 0; k < K; k++)
      for (int column = 0; column < 8; column++) sum[column] += a[row][k] * b[k][column];
    for (int i = 0; i < 4; i++) {
      half_row[i][0] = sum[2 * i];
      half_row[i][1] = sum[2 * i + 1];
    }
  }
}

// m16n8k16: register r of a holds row lane / 4 + 8 (r % 2), columns 2 (lane % 4) + 8 (r / 2) and the next;
// register r of b rows 2 (lane % 4) + 8 r and the next of column lane / 4.
template <float (*to_float)(uint16_t)>
bool execute_mma_16_bit(Warp& warp) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < LANES; lane++) {
    const Product& mine = operands_of<Product>(warp, lane);
    int group = lane / 4, pair = lane % 4 * 2;
    for (int half = 0; half < 2; half++) {
      for (int r = 0; r < 4; r++)
        a[group + r % 2 * 8][pair + r / 2 * 8 + half] = to_float(static_cast<uint16_t>(mine.a[r] >> 16 * half));
      for (int r = 0; r < 2; r++) b[pair + r * 8 + half][group] = to_float(static_cast<uint16_t>(mine.b[r] >> 16 * half));
    }
  }
  multiply<16>(warp, a, b);
  return true;
}

// m16n8k8: register r of a holds row lane / 4 + 8 (r % 2), column lane % 4 + 4 (r / 2); register r of b row lane % 4 + 4 r,
// column lane / 4.
bool execute_mma_tf32(Warp& warp) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < LANES; lane++) {
    const Product& mine = operands_of<Product>(warp, lane);
    for (int r = 0; r < 4; r++) a[lane / 4 + r % 2 * 8][lane % 4 + r / 2 * 4] = tf32_operand(mine.a[r]);
    for (int r = 0; r < 2; r++) b[lane % 4 + r * 4][lane / 4] = tf32_operand(mine.b[r]);
  }
  multiply<8>(warp, a, b);
  return true;
}

}  // namespace

uint64_t exchange_bits(const char* name, uint64_t bits, int source_lane, Site site) {
  Exchange exchange{bits, 0, source_lane};
  meet(name, site, &exchange, execute_exchange);
  return exchange.theirs;
}

uint32_t ballot(const char* name, bool predicate, Site site) {
  Vote vote{predicate, 0};
  meet(name, site, &vote, execute_vote);
  return vote.ballot;
}

// The rows are read by the warp, not by the lane that gives their address: that lane's own writes need a barrier too.
void ldmatrix(uint32_t* r, int matrices, bool transposed, const void* row, Site site) {
  uintptr_t address = reinterpret_cast<uintptr_t>(row);
  if (current_lane() < 8 * matrices) {
    if (!in_shared(address)) {
      report("out of bounds", site, "ldmatrix reads at %p, which is not in shared memory", row);
      abandon();
    }
    if (address % 16) {
      report("misaligned", site, "ldmatrix reads a row at byte %td of shared memory, which is not a multiple of 16",
             static_cast<const unsigned char*>(row) - shared);
      abandon();
    }
    access_shared(address, 16, false, true, site);
  }
  Matrices mine{r, static_cast<const unsigned char*>(row), matrices, transposed};
  const char* names[] = {"ldmatrix_x2", "ldmatrix_x2_trans", "ldmatrix_x4", "ldmatrix_x4_trans"};
  meet(names[matrices / 4 * 2 + transposed], site, &mine, execute_ldmatrix);
}

void mma_half(float* d, const uint32_t* a, const uint32_t* b, Site site) {
  Product product{d, a, b};
  meet("mma_m16n8k16<Half>", site, &product, execute_mma_16_bit<half_to_float>);
}

void mma_bfloat16(float* d, const uint32_t* a, const uint32_t* b, Site site) {
  Product product{d, a, b};
  meet("mma_m16n8k16<Bfloat16>", site, &product, execute_mma_16_bit<bfloat16_to_float>);
}

void mma_tf32(float* d, const uint32_t* a, const uint32_t* b, Site site) {
  Product product{d, a, b};
  meet("mma_m16n8k8_tf32", site, &product, execute_mma_tf32);
}

}  // namespace fastattn::emulator
