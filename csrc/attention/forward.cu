// Attention forward: out = softmax(scale q k^T + mask) v and the log-sum-exp of the scores, by the online softmax of
// FlashAttention-2 (Dao, 2023, arXiv:2307.08691) on mma.sync, for sm_80 and up.
//
// Tile plan: a block of 4 warps takes 64 queries of one head, 16 a warp, and walks over the keys in tiles of 64. Q stays in
// registers; K and V come through two stages of asynchronous copies. Scores and probabilities never leave registers: the
// accumulator of Q K^T has the layout that P V wants of its left operand. Shared memory: (1 + 2 * 2) tiles of 64 x D, 20, 40 and
// 80 KB for D = 32, 64, 128.
//
// Bytes: q and out once, k and v once per 64 queries of a head (from L2 after the first), lse 4 per query: with M = N = S that is
// 8 D S + 4 S per head at least, 4 D S (1 + ceil(S / 64)) + 4 S as seen by L2. MMA: 4 D FLOPs per pair of a visited tile; S^2 is
// rounded up to 64 in both directions, tiles with no visible pair are skipped, tiles with no hidden pair run without a mask. Per
// pair beside the MMA: one multiply, one maximum, one subtraction, one ex2, one addition, half a conversion.
//
// Scores are in units of log 2. A hidden pair is selected to -inf, never added; a hidden key is read as 0, so what it holds (NaN
// too) reaches nothing. A query that sees no key: out 0, lse -inf.
#include "forward.h"

#include "../common/tile.cuh"
#include "mask.cuh"

#include <cmath>
#include <stdexcept>

namespace fastattn {
namespace {

constexpr int BLOCK_M = 64, BLOCK_N = 64, THREADS = 128;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
constexpr float INF = INFINITY;

// The running state of the online softmax for the two rows (lane / 4, + 8) of which this thread holds a part.
template <int D>
struct Softmax {
  float out[D / 8][4];  // accumulator of P V
  float top[2];         // maximum so far
  float total[2];       // this thread's part of the sum of weights
};

// S = Q K^T for 16 queries and 64 keys, in units of log 2.
template <class T, int D>
DEVICE void scores(float (&s)[BLOCK_N / 8][4], const uint32_t (&q)[D / 16][4], const unsigned char* k_tile, float scale) {
#pragma unroll
  for (int i = 0; i < BLOCK_N / 8; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) s[i][e] = 0;
#pragma unroll
  for (int k = 0; k < D / 16; k++)
#pragma unroll
    for (int j = 0; j < BLOCK_N / 16; j++) {
      uint32_t b[4];
      load_b<D / 8>(b, k_tile, j * 16, k * 2);
      mma_m16n8k16<T>(s[2 * j], q[k], {b[0], b[1]});
      mma_m16n8k16<T>(s[2 * j + 1], q[k], {b[2], b[3]});
    }
#pragma unroll
  for (int i = 0; i < BLOCK_N / 8; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) s[i][e] *= scale;
}

// -inf where the mask hides the pair of key n0 + column and query m or m + 8.
DEVICE void hide(float (&s)[BLOCK_N / 8][4], const Mask& mask, const Bounds& r, int b, int h, int m, int n0) {
  int column = n0 + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < BLOCK_N / 8; i++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      int n = column + i * 8 + e;
      bool live = live_key(mask, r, b, n);
#pragma unroll
      for (int half = 0; half < 2; half++)
        if (!live || !live_query(mask, r, b, m + half * 8) || !visible(mask, r, b, h, m + half * 8, n)) s[i][half * 2 + e] = -INF;
    }
}

// One step of the online softmax: s becomes the weights, rounded to T in the layout of an A operand.
template <class T, int D>
DEVICE void weights(uint32_t (&weight)[BLOCK_N / 16][4], float (&s)[BLOCK_N / 8][4], Softmax<D>& state) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float top = state.top[half];
#pragma unroll
    for (int i = 0; i < BLOCK_N / 8; i++) top = fmaxf(top, fmaxf(s[i][half * 2], s[i][half * 2 + 1]));
    top = fmaxf(top, shuffle_xor(top, 1));
    top = fmaxf(top, shuffle_xor(top, 2));
    float shift = top == -INF ? 0.0f : top;  // a row that has seen no key yet
    float rescale = exp2_approximate(state.top[half] - shift);
    state.top[half] = top;
    state.total[half] *= rescale;
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
      state.out[i][half * 2] *= rescale;
      state.out[i][half * 2 + 1] *= rescale;
    }
#pragma unroll
    for (int i = 0; i < BLOCK_N / 8; i++) {
      float low = exp2_approximate(s[i][half * 2] - shift), high = exp2_approximate(s[i][half * 2 + 1] - shift);
      state.total[half] += low + high;
      weight[i / 2][i % 2 * 2 + half] = pack<T>(low, high);
    }
  }
}

template <class T, int D>
DEVICE void accumulate(Softmax<D>& state, const uint32_t (&weight)[BLOCK_N / 16][4], const unsigned char* v_tile) {
#pragma unroll
  for (int k = 0; k < BLOCK_N / 16; k++)
#pragma unroll
    for (int j = 0; j < D / 16; j++) {
      uint32_t b[4];
      load_b_trans<D / 8>(b, v_tile, k * 16, j * 2);
      mma_m16n8k16<T>(state.out[2 * j], weight[k], {b[0], b[1]});
      mma_m16n8k16<T>(state.out[2 * j + 1], weight[k], {b[2], b[3]});
    }
}

// Divide by the sum of weights, write out and lse. The 16 rows of a warp go through its own part of `tile`, for 16-byte stores.
template <class T, int D>
DEVICE void finish(const AttentionForward& p, const Softmax<D>& state, unsigned char* tile, int64_t head, int m0, int rows) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int b = static_cast<int>(head / p.H), h = static_cast<int>(head % p.H);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int row = warp * 16 + half * 8 + lane / 4, m = m0 + row;
    float total = state.total[half];
    total += shuffle_xor(total, 1);
    total += shuffle_xor(total, 2);
    bool dead = m >= rows || total == 0.0f;
    float inverse = dead ? 0.0f : 1.0f / total;
    if (lane % 4 == 0 && m < p.M) p.lse[head * p.M + m] = dead ? -INF : (state.top[half] + log2f(total)) * LN_2;
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
      float low = dead ? 0.0f : state.out[i][half * 2] * inverse, high = dead ? 0.0f : state.out[i][half * 2 + 1] * inverse;
      *reinterpret_cast<uint32_t*>(tile + chunk_offset<D / 8>(row, i) + lane % 4 * 4) = pack<T>(low, high);
    }
  }
  warp_barrier();
  T* out = static_cast<T*>(p.out.data) + b * p.out.batch + h * p.out.head;
#pragma unroll
  for (int i = 0; i < 16 * D / 8 / 32; i++) {
    int index = i * 32 + lane, row = warp * 16 + index / (D / 8), chunk = index % (D / 8);
    if (m0 + row < p.M)
      *reinterpret_cast<uint4*>(out + (m0 + row) * p.out.row + chunk * 8) =
          *reinterpret_cast<const uint4*>(tile + chunk_offset<D / 8>(row, chunk));
  }
}

// Blocks that share a multiprocessor: as many as registers allow without spills.
template <int D>
constexpr int RESIDENT = D == 128  ? 2
                         : D == 64 ? 3
                                   : 4;

template <class T, int D>
KERNEL(THREADS, RESIDENT<D>)
attention_forward_kernel(KERNEL_ARGUMENT AttentionForward p) {
  SHARED_MEMORY(shared);
  constexpr int TILE = BLOCK_N * D * 2;
  unsigned char *q_tile = shared, *k_tiles = shared + TILE, *v_tiles = shared + 3 * TILE;

  int blocks = (p.M + BLOCK_M - 1) / BLOCK_M;
  int64_t head = blockIdx.x / blocks;
  int m0 = static_cast<int>(blockIdx.x % blocks) * BLOCK_M;
  int b = static_cast<int>(head / p.H), h = static_cast<int>(head % p.H);
  const T* q = static_cast<const T*>(p.q.data) + b * p.q.batch + h * p.q.head;
  int kv = h / (p.H / p.Hkv);
  const T* k = static_cast<const T*>(p.k.data) + b * p.k.batch + kv * p.k.head;
  const T* v = static_cast<const T*>(p.v.data) + b * p.v.batch + kv * p.v.head;
  Bounds r = bounds(p.mask, b, p.M, p.N);
  Run run{0, 0, 0, 0};
  if (m0 < r.rows) run = key_run(p.mask, r, m0, min(m0 + BLOCK_M, r.rows) - 1);
  int first = run.first / BLOCK_N * BLOCK_N, tiles = max(run.last - first + BLOCK_N - 1, 0) / BLOCK_N;

  auto load_keys = [&](int tile) {
    int n0 = first + tile * BLOCK_N, stage = tile % 2 * TILE;
    auto count = [&](int row, int) { return live_key(p.mask, r, b, n0 + row) ? 8 : 0; };
    load_tile<T, BLOCK_N, D, THREADS>(k_tiles + stage, k + n0 * p.k.row, p.k.row, p.aligned, count);
    load_tile<T, BLOCK_N, D, THREADS>(v_tiles + stage, v + n0 * p.v.row, p.v.row, p.aligned, count);
  };
  load_tile<T, BLOCK_M, D, THREADS>(q_tile, q + m0 * p.q.row, p.q.row, p.aligned,
                                    [&](int row, int) { return m0 + row < p.M && live_query(p.mask, r, b, m0 + row) ? 8 : 0; });
  if (tiles > 0) load_keys(0);
  cp_async_commit();

  int warp = threadIdx.x / 32, m = m0 + warp * 16 + threadIdx.x % 32 / 4;
  uint32_t q_fragments[D / 16][4];
  Softmax<D> state;
#pragma unroll
  for (int i = 0; i < D / 8; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) state.out[i][e] = 0;
  state.top[0] = state.top[1] = -INF;
  state.total[0] = state.total[1] = 0;

  for (int tile = 0; tile < tiles; tile++) {
    if (tile + 1 < tiles) load_keys(tile + 1);
    cp_async_commit();
    cp_async_wait<1>();
    block_barrier();
    if (tile == 0) {
#pragma unroll
      for (int i = 0; i < D / 16; i++) load_a<D / 8>(q_fragments[i], q_tile, warp * 16, i * 2);
    }
    int n0 = first + tile * BLOCK_N, stage = tile % 2 * TILE;
    float s[BLOCK_N / 8][4];
    scores<T, D>(s, q_fragments, k_tiles + stage, p.scale * LOG2_E);
    bool bounded = p.mask.keys == nullptr && p.mask.ids == nullptr && p.mask.bits == nullptr;
    bool full = bounded && n0 >= run.full_first && n0 + BLOCK_N <= run.full_last;
    if (!full) hide(s, p.mask, r, b, h, m, n0);
    uint32_t weight[BLOCK_N / 16][4];
    weights<T, D>(weight, s, state);
    accumulate<T, D>(state, weight, v_tiles + stage);
    block_barrier();  // before the copy of the tile after next overwrites this stage
  }
  cp_async_wait<0>();
  block_barrier();
  finish<T, D>(p, state, q_tile, head, m0, r.rows);
}

template <class T, int D>
const Kernel KERNEL_INFO{"attention_forward_kernel<" + std::string(T::NAME) + ", " + std::to_string(D) + ">", THREADS,
                         5 * BLOCK_N * D * 2};

template <class T, int D>
void start(const AttentionForward& p, uintptr_t stream) {
  const Kernel& kernel = KERNEL_INFO<T, D>;
  int64_t blocks = static_cast<int64_t>(p.B) * p.H * ((p.M + BLOCK_M - 1) / BLOCK_M);
  launch<attention_forward_kernel<T, D>>(kernel.name.c_str(), {blocks, kernel.threads, kernel.shared_bytes, stream}, p);
}

template <class T>
void start(const AttentionForward& p, uintptr_t stream) {
  if (p.D == 32) return start<T, 32>(p, stream);
  if (p.D == 64) return start<T, 64>(p, stream);
  if (p.D == 128) return start<T, 128>(p, stream);
  throw std::runtime_error("attention_forward: head dimension " + std::to_string(p.D) + " is not 32, 64 or 128");
}

}  // namespace

void attention_forward(const AttentionForward& p, uintptr_t stream) {
  p.bfloat16 ? start<Bfloat16>(p, stream) : start<Half>(p, stream);
}

std::vector<Kernel> attention_forward_kernels() {
  return {KERNEL_INFO<Half, 32>,     KERNEL_INFO<Half, 64>,     KERNEL_INFO<Half, 128>,
          KERNEL_INFO<Bfloat16, 32>, KERNEL_INFO<Bfloat16, 64>, KERNEL_INFO<Bfloat16, 128>};
}

}  // namespace fastattn
