// Attention forward for any number of keys: the online softmax of FlashAttention-2 (Dao, 2023, arXiv:2307.08691) on mma.sync, for
// sm_80 and up.
//
// Tile plan: a block of 4 warps takes 64 queries of one head, 16 a warp, and walks over the tiles of 64 keys that its run or the
// mask's list holds. Q stays in registers; K and V come through two stages of asynchronous copies. Shared memory: (1 + 2 * 2)
// tiles of 64 x D, 20, 40 and 80 KB for D = 32, 64, 128.
//
// Bytes: q and out once, k and v once per 64 queries of a head (from L2 after the first), lse 4 per query: with M = N = S that is
// 8 D S + 4 S per head at least, 4 D S (1 + ceil(S / 64)) + 4 S as seen by L2. MMA: 4 D FLOPs per pair; a warp multiplies the
// blocks of 16 queries x 16 keys in its run, so S^2 is rounded up to 16 in both directions (5% more at 577), and blocks that hide
// nothing run without a mask. Per pair beside the MMA: one maximum, one fused multiply-add, one ex2, one addition, half a
// conversion.
#include "forward.cuh"

namespace fastattn {
namespace {

constexpr int BLOCK_M = MASK_TILE, BLOCK_N = MASK_TILE, THREADS = BLOCK_M / BLOCK * 32;

// The maximum with a tile of scores more, to which what has been summed up is rescaled.
template <int D>
DEVICE void advance(float (&shift)[2], Softmax<D>& state, const float (*s)[4], float factor) {
  float before[2] = {state.top[0], state.top[1]};
  raise_top<BLOCK_N / 8>(state, s);
  share_top(shift, state, factor);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float rescale = exp2_approximate(fmaf(before[half], factor, -shift[half]));
    state.total[half] *= rescale;
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
      state.out[i][half * 2] *= rescale;
      state.out[i][half * 2 + 1] *= rescale;
    }
  }
}

// Blocks that share a multiprocessor: as many as registers allow without spills.
template <int D>
constexpr int SHARING = D == 128 ? 2 : 3;

template <class T, int D>
KERNEL(THREADS, SHARING<D>)
attention_forward_streaming_kernel(KERNEL_ARGUMENT AttentionForward p) {
  SHARED_MEMORY(shared);
  constexpr int TILE = BLOCK_N * D * 2;
  unsigned char *q_tile = shared, *k_tiles = shared + TILE, *v_tiles = shared + 3 * TILE;

  int parts = (p.M - 1) / BLOCK_M + 1;
  int64_t head = blockIdx.x / parts;
  int m0 = static_cast<int>(blockIdx.x % parts) * BLOCK_M;
  int b = static_cast<int>(head / p.H), h = static_cast<int>(head % p.H), kv = h / (p.H / p.Hkv);
  Span queries = span(p.mask.query_starts, b, p.M), keys = span(p.mask.key_starts, b, p.N);
  if (m0 >= queries.count) return;  // the grid is of the longest sequence
  const T* q = static_cast<const T*>(p.q.data) + b * p.q.batch + h * p.q.head + queries.first * p.q.row;
  const T* k = static_cast<const T*>(p.k.data) + b * p.k.batch + kv * p.k.head + keys.first * p.k.row;
  const T* v = static_cast<const T*>(p.v.data) + b * p.v.batch + kv * p.v.head + keys.first * p.v.row;
  Bounds r = bounds(p.mask, b, queries.count, keys.count);
  Run run = block_run(p.mask, r, m0, BLOCK_M);
  KeyTiles tiles = key_tiles(p.mask, run, b, h, m0);

  auto load_keys = [&](int i) {
    int n0 = tile_at(tiles, i) * BLOCK_N, stage = i % 2 * TILE;
    auto count = [&](int row, int) { return live_key(p.mask, r, b, n0 + row) ? 8 : 0; };
    load_tile<T, BLOCK_N, D, THREADS>(k_tiles + stage, k + n0 * p.k.row, p.k.row, p.aligned, count);
    load_tile<T, BLOCK_N, D, THREADS>(v_tiles + stage, v + n0 * p.v.row, p.v.row, p.aligned, count);
  };
  load_tile<T, BLOCK_M, D, THREADS>(q_tile, q + m0 * p.q.row, p.q.row, p.aligned,
                                    [&](int row, int) { return live_query(p.mask, r, b, m0 + row) ? 8 : 0; });
  if (tiles.count > 0) load_keys(0);
  cp_async_commit();

  int m_warp = m0 + threadIdx.x / 32 * BLOCK;
  unsigned char* q_rows = q_tile + threadIdx.x / 32 * BLOCK * D * 2;
  Run warp_run = block_run(p.mask, r, m_warp, BLOCK);
  MaskRows rows = mask_rows(p.mask, r, b, h, m_warp + threadIdx.x % 32 / 4);
  float factor = exponent_factor(p.scale);
  uint32_t q_fragments[D / 16][4];
  Softmax<D> state;
  clear(state);

  for (int i = 0; i < tiles.count; i++) {
    if (i + 1 < tiles.count) load_keys(i + 1);
    cp_async_commit();
    cp_async_wait<1>();
    block_barrier();
    if (i == 0) load_queries<D>(q_fragments, q_rows, p.scale);
    int stage = i % 2 * TILE;
    Blocks blocks = tile_blocks(p.mask, tiles, i, warp_run);
    if (blocks.visited != 0) {
      uint32_t pairs = tile_pairs(p.mask, rows, tile_at(tiles, i) * BLOCK_N, blocks);
      float s[BLOCK_N / 8][4], shift[2];
      scores<T, D, TILE_BLOCKS>(s, q_fragments, k_tiles + stage, 0, blocks.visited);
      hide<TILE_BLOCKS>(s, pairs);
      advance(shift, state, s, factor);
      accumulate<T, D, TILE_BLOCKS>(state, s, shift, factor, v_tiles + stage, blocks.visited);
    }
    block_barrier();  // before the copy of the tile after next overwrites this stage
  }
  cp_async_wait<0>();
  block_barrier();
  finish<T, D>(p, state, factor, q_rows, b, h, m_warp, r.rows);
}

template <class T, int D>
const Kernel KERNEL_INFO{"attention_forward_streaming_kernel<" + std::string(T::NAME) + ", " + std::to_string(D) + ">", THREADS,
                         5 * BLOCK_N * D * 2};

template <class T, int D>
void start(const AttentionForward& p, const AttentionForwardConfig& config, uintptr_t stream) {
  int64_t blocks = static_cast<int64_t>(p.B) * p.H * ((p.M - 1) / BLOCK_M + 1);
  Launch where{blocks, config.warps * 32, config.shared_bytes, stream};
  launch<attention_forward_streaming_kernel<T, D>>(KERNEL_INFO<T, D>.name.c_str(), where, p);
}

template <class T>
void start(const AttentionForward& p, const AttentionForwardConfig& config, uintptr_t stream) {
  if (p.D == 32) return start<T, 32>(p, config, stream);
  if (p.D == 64) return start<T, 64>(p, config, stream);
  return start<T, 128>(p, config, stream);
}

}  // namespace

void attention_forward_streaming(const AttentionForward& p, const AttentionForwardConfig& config, uintptr_t stream) {
  p.bfloat16 ? start<Bfloat16>(p, config, stream) : start<Half>(p, config, stream);
}

std::vector<Kernel> attention_forward_streaming_kernels() {
  return {KERNEL_INFO<Half, 32>,     KERNEL_INFO<Half, 64>,     KERNEL_INFO<Half, 128>,
          KERNEL_INFO<Bfloat16, 32>, KERNEL_INFO<Bfloat16, 64>, KERNEL_INFO<Bfloat16, 128>};
}

}  // namespace fastattn
