// Attention forward: out = softmax(scale q k^T + mask) v and the log-sum-exp of the scores. Which of the two kernels serves a
// request, with how many warps and queries a block, and which blocks of pairs it multiplies.
#include "forward.h"

#include "forward_blocks.cuh"

#include <stdexcept>

namespace fastattn {
namespace {

constexpr int MOST_ROWS = 320;  // of a resident block: beyond, reading K and V again costs little beside q and out
constexpr int LEAST_ROWS = 64;  // where shared memory is short: below, K and V are read too often
constexpr int RESERVED = 1024;  // bytes of shared memory that a multiprocessor keeps for each block
constexpr int LEAST_WARPS = 4, MOST_WARPS = 8;

int rounded_up(int x, int to) { return (x + to - 1) / to * to; }

// The number of warps with which most of those that fit on a multiprocessor are at work: registers leave room for `all` of them.
int best_warps(int tiles, int all, int shared_bytes, int shared_limit) {
  int best = 0;
  double most = 0;
  for (int warps = LEAST_WARPS; warps <= MOST_WARPS; warps++) {
    int blocks = min((shared_limit + RESERVED) / (shared_bytes + RESERVED), all / warps);
    int rounds = (tiles + warps - 1) / warps;
    double working = static_cast<double>(blocks) * tiles / rounds;
    if (working >= most) best = warps, most = working;
  }
  return best;
}

}  // namespace

AttentionForwardConfig attention_forward_config(int D, int M, int N, int shared_limit) {
  AttentionForwardConfig streaming{0, MASK_TILE / BLOCK, MASK_TILE, 5 * MASK_TILE * D * 2};
  if (N > CAPACITY) return streaming;
  bool small = N <= CAPACITY_SMALL;
  int room = shared_limit / (D * 2) - 2 * rounded_up(N, BLOCK);  // for rows of q
  int most = min(room / BLOCK * BLOCK, MOST_ROWS);
  if (most < min(LEAST_ROWS, M)) return streaming;
  int parts = (M - 1) / most + 1;
  int tiles = max(((M - 1) / parts + BLOCK) / BLOCK, 1);
  int shared_bytes = (2 * rounded_up(N, BLOCK) + tiles * BLOCK) * D * 2;
  int all = small && D < 128 ? 16 : 8;  // see SHARING in forward_resident.cu
  return {small ? CAPACITY_SMALL : CAPACITY, best_warps(tiles, all, shared_bytes, shared_limit), tiles * BLOCK, shared_bytes};
}

std::vector<AttentionForwardBlock> attention_forward_blocks(const AttentionForward& p, int shared_limit) {
  bool resident = attention_forward_config(p.D, p.M, p.N, shared_limit).capacity > 0;
  std::vector<AttentionForwardBlock> found;
  for (int b = 0; b < p.B; b++)
    for (int h = 0; h < p.H; h++) {
      Span queries = span(p.mask.query_starts, b, p.M), keys = span(p.mask.key_starts, b, p.N);
      for (int m = 0; m < queries.count; m += BLOCK) {
        Bounds r = bounds(p.mask, b, queries.count, keys.count);
        Run run = block_run(p.mask, r, m, BLOCK);
        auto add = [&](const Blocks& blocks, int first) {
          for (int i = 0; i < 32; i++)
            if ((blocks.visited >> i & 1) != 0) found.push_back({b, h, m, first + i * BLOCK, BLOCK, (blocks.full >> i & 1) == 0});
        };
        if (resident) {
          RowBlocks blocks = row_blocks(p.mask, run, b, h, m);
          add({blocks.visited, blocks.full}, 0);
          if (blocks.tail >= 0) found.push_back({b, h, m, blocks.tail, 8, true});
        } else {
          int m0 = m / MASK_TILE * MASK_TILE;
          KeyTiles tiles = key_tiles(p.mask, block_run(p.mask, r, m0, MASK_TILE), b, h, m0);
          for (int i = 0; i < tiles.count; i++) add(tile_blocks(p.mask, tiles, i, run), tile_at(tiles, i) * MASK_TILE);
        }
      }
    }
  return found;
}

void attention_forward(const AttentionForward& p, uintptr_t stream) {
  if (p.D != 32 && p.D != 64 && p.D != 128)
    throw std::runtime_error("attention_forward: head dimension " + std::to_string(p.D) + " is not 32, 64 or 128");
  AttentionForwardConfig config = attention_forward_config(p.D, p.M, p.N, shared_memory_limit("attention_forward"));
  config.capacity > 0 ? attention_forward_resident(p, config, stream) : attention_forward_streaming(p, config, stream);
}

std::vector<Kernel> attention_forward_kernels() {
  std::vector<Kernel> kernels = attention_forward_resident_kernels(), others = attention_forward_streaming_kernels();
  kernels.insert(kernels.end(), others.begin(), others.end());
  return kernels;
}

}  // namespace fastattn
