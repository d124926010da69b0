// Attention backward for any length, in two kernels: one makes dQ and delta, one dK and dV. Nothing is added across blocks, so
// gradients are deterministic. For sm_80 and up.
//
// Tile plan. dQ: a block of 4 warps takes 64 queries of one head, 16 a warp, and walks over the keys in tiles of 64; P and dS
// stay in registers, where the accumulator of a product has the layout of the next one's left operand. dK and dV: a block of 4
// warps takes 64 keys of one head of k and v, 16 a warp, and walks over the queries of every head that reads it in tiles of 32; P
// and dS are turned round through 1 KB of shared memory a warp. Tiles come through two stages of asynchronous copies. Shared
// memory for D = 32, 64, 128: dQ 24.5, 48.5 and 96.5 KB, dK and dV 20.5, 36.5 and 68.5 KB.
//
// Bytes, with M = N = S, per head: dQ reads q, out and dout and writes dq once, and reads k and v once per 64 queries; dK and dV
// read k and v and write dk and dv once, and read q and dout once per 64 keys; repeated reads are from L2. That is 24 D S at
// least, where one kernel needs 16 D S (backward_single.cu), and 16 S for lse and delta. MMA: 14 D FLOPs per pair of a visited
// tile, 6 D in dQ and 8 D in dK and dV, where 10 D would do if S and dO V^T were not made twice. Tiles with no visible pair are
// skipped, blocks of 16 beyond the ends too, tiles with no hidden pair run without a mask.
//
// A hidden pair is selected to 0. What a hidden key, or a query that sees no key, holds (NaN too) reaches nothing: both are read
// as 0.
#include "backward.cuh"

#include <stdexcept>

namespace fastattn {
namespace {

constexpr int BLOCK = 64, THREADS = 128, WARPS = THREADS / 32;
static_assert(BLOCK == MASK_TILE);

// Blocks that share a multiprocessor: as many as registers allow without spills.
template <int D>
constexpr int RESIDENT = D == 128 ? 2 : 3;

template <int D>
constexpr int DQ_BYTES = 6 * BLOCK * D * 2 + 2 * BLOCK * 4;

// acc += dS K: the accumulators of dS become left operands.
template <class T, int D>
DEVICE void add_keys(float (&acc)[D / 8][4], const float (&ds)[BLOCK / 8][4], const unsigned char* k_tile, int blocks) {
#pragma unroll
  for (int k = 0; k < BLOCK / 16; k++)
    if (k < blocks) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] = pack<T>(ds[2 * k + i / 2][i % 2 * 2], ds[2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int j = 0; j < D / 16; j++) {
        uint32_t b[4];
        load_b_trans<D / 8>(b, k_tile, k * 16, j * 2);
        mma_m16n8k16<T>(acc[2 * j], a, {b[0], b[1]});
        mma_m16n8k16<T>(acc[2 * j + 1], a, {b[2], b[3]});
      }
    }
}

template <class T, int D>
KERNEL(THREADS, RESIDENT<D>)
attention_dq_kernel(KERNEL_ARGUMENT AttentionBackward p) {
  SHARED_MEMORY(shared);
  constexpr int TILE = BLOCK * D * 2, ROWS = 16 * D * 2;
  unsigned char *q_tile = shared, *do_tile = shared + TILE, *k_tiles = shared + 2 * TILE, *v_tiles = shared + 4 * TILE;
  float *shift = reinterpret_cast<float*>(shared + 6 * TILE), *delta = shift + BLOCK;

  int parts = (p.M + BLOCK - 1) / BLOCK, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t head = blockIdx.x / parts;
  int m0 = static_cast<int>(blockIdx.x % parts) * BLOCK, m = m0 + warp * 16;
  int b = static_cast<int>(head / p.H), h = static_cast<int>(head % p.H), kv = h / (p.H / p.Hkv);
  Span queries = span(p.mask.query_starts, b, p.M), keys = span(p.mask.key_starts, b, p.N);
  if (m0 >= queries.count) return;  // the grid is of the longest sequence
  const T* k = static_cast<const T*>(p.k.data) + b * p.k.batch + kv * p.k.head + keys.first * p.k.row;
  const T* v = static_cast<const T*>(p.v.data) + b * p.v.batch + kv * p.v.head + keys.first * p.v.row;
  Bounds r = bounds(p.mask, b, queries.count, keys.count);
  Run run{0, 0, 0, 0};
  if (m0 < r.rows) run = key_run(p.mask, r, m0, min(m0 + BLOCK, r.rows) - 1);
  Visits<BLOCK> tiles = visits<BLOCK>(p.mask.key_tiles, b, h, m0 / BLOCK, run.first, run.last);

  auto load_queries = [&](unsigned char* tile, const Heads& x) {
    const T* rows = static_cast<const T*>(x.data) + b * x.batch + h * x.head + (queries.first + m0) * x.row;
    load_tile<T, BLOCK, D, THREADS>(tile, rows, x.row, p.aligned, [&](int row, int) { return m0 + row < r.rows ? 8 : 0; });
  };
  auto load_keys = [&](int tile) {
    int n0 = tiles.start(tile), stage = tile % 2 * TILE;
    auto count = [&](int row, int) { return live_key(p.mask, r, b, n0 + row) ? 8 : 0; };
    load_tile<T, BLOCK, D, THREADS>(k_tiles + stage, k + n0 * p.k.row, p.k.row, p.aligned, count);
    load_tile<T, BLOCK, D, THREADS>(v_tiles + stage, v + n0 * p.v.row, p.v.row, p.aligned, count);
  };
  unsigned char* out_tile = k_tiles + TILE;  // free until the second tile of keys
  load_queries(q_tile, p.q);
  load_queries(do_tile, p.dout);
  load_queries(out_tile, p.out);
  if (tiles.count > 0) load_keys(0);
  cp_async_commit();
  bool mine = lane < 16 && m + lane < queries.count;
  int64_t row = b * p.lse_batch + h * p.lse_head + queries.first + m + lane;
  float lse = mine ? p.lse[row] : -INF;
  float dlse = mine && p.dlse != nullptr ? p.dlse[row] : 0.0f;
  cp_async_wait<0>();
  block_barrier();
  q_tile += warp * ROWS, do_tile += warp * ROWS, shift += warp * 16, delta += warp * 16;  // to the warp's own rows
  prepare<T, D>(q_tile, do_tile, out_tile + warp * ROWS, shift, delta, lse, dlse, 0, 256 / D, 16);
  block_barrier();
  if (mine) p.delta[row] = delta[lane];

  float acc[D / 8][4];
#pragma unroll
  for (int i = 0; i < D / 8; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) acc[i][e] = 0;
  for (int tile = 0; tile < tiles.count; tile++) {
    if (tile + 1 < tiles.count) load_keys(tile + 1);
    cp_async_commit();
    cp_async_wait<1>();
    block_barrier();
    int n0 = tiles.start(tile), stage = tile % 2 * TILE, key_blocks = (r.end - n0 + 15) / 16;
    Kind visible = kind<BLOCK>(p.mask, r, m, n0, tiles.listed(tile, p.mask));
    if (visible != EMPTY) {
      float weight[BLOCK / 8][4], ds[BLOCK / 8][4];
      weights<T, D, BLOCK>(weight, ds, {q_tile, do_tile, shift, delta}, k_tiles + stage, v_tiles + stage, key_blocks, p.scale,
                           [&](float (&x)[BLOCK / 8][4]) {
                             if (visible != FULL) hide<BLOCK>(x, p.mask, r, b, h, m, n0);
                           });
      add_keys<T, D>(acc, ds, k_tiles + stage, key_blocks);
    }
    block_barrier();  // before the copy of the tile after next overwrites this stage
  }
  cp_async_wait<0>();
  queries = span(p.mask.query_starts, b, p.M);
  T* dq = static_cast<T*>(p.dq.data) + b * p.dq.batch + h * p.dq.head + (queries.first + m) * p.dq.row;
  store_rows<T, D>(dq, p.dq.row, acc, p.scale, queries.count - m);
}

constexpr int KEYS = 16;  // of a warp
template <int D>
constexpr int DKDV_BYTES = 2 * BLOCK * D * 2 + 4 * BLOCK_Q * D * 2 + WARPS * 2 * 16 * KEYS * 2 + 2 * 2 * BLOCK_Q * 4;

// A tile of queries of one of the heads that read a head of k and v.
struct Cursor {
  Visits<BLOCK_Q> tiles;
  int head, index;
};

template <class T, int D>
KERNEL(THREADS, RESIDENT<D>)
attention_dkdv_kernel(KERNEL_ARGUMENT AttentionBackward p) {
  SHARED_MEMORY(shared);
  constexpr int TILE = BLOCK * D * 2, STAGE = 2 * BLOCK_Q * D * 2, TURNED = 16 * KEYS * 2;
  unsigned char *k_tile = shared, *v_tile = shared + TILE, *stages = shared + 2 * TILE, *turned = stages + 2 * STAGE;
  float* statistics = reinterpret_cast<float*>(turned + WARPS * 2 * TURNED);

  int parts = (p.N + BLOCK - 1) / BLOCK, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t kv_head = blockIdx.x / parts;
  int n0 = static_cast<int>(blockIdx.x % parts) * BLOCK, n = n0 + warp * KEYS;
  int b = static_cast<int>(kv_head / p.Hkv), kv = static_cast<int>(kv_head % p.Hkv), group = p.H / p.Hkv;
  Span queries = span(p.mask.query_starts, b, p.M), keys = span(p.mask.key_starts, b, p.N);
  if (n0 >= keys.count) return;  // the grid is of the longest sequence
  Bounds r = bounds(p.mask, b, queries.count, keys.count);
  int begin = max(n0, r.begin), end = min(n0 + BLOCK, r.end);
  Run run{0, 0, 0, 0};
  if (begin < end) run = query_run(p.mask, r, begin, end - 1);

  auto load_keys = [&](unsigned char* tile, const Heads& x) {
    const T* rows = static_cast<const T*>(x.data) + b * x.batch + kv * x.head + (keys.first + n0) * x.row;
    load_tile<T, BLOCK, D, THREADS>(tile, rows, x.row, p.aligned,
                                    [&](int row, int) { return live_key(p.mask, r, b, n0 + row) ? 8 : 0; });
  };
  auto load_queries = [&](unsigned char* tile, const Heads& x, int h, int m0) {
    const T* rows = static_cast<const T*>(x.data) + b * x.batch + h * x.head + queries.first * x.row + m0 * x.row;
    load_tile<T, BLOCK_Q, D, THREADS>(tile, rows, x.row, p.aligned, [&](int row, int) { return m0 + row < r.rows ? 8 : 0; });
  };
  auto visit = [&](int h) { return visits<BLOCK_Q>(p.mask.query_tiles, b, h, n0 / BLOCK, run.first, run.last); };
  int after = (kv + 1) * group;
  auto advance = [&](Cursor& at) {
    at.index++;
    while (at.index >= at.tiles.count && ++at.head < after) at.tiles = visit(at.head), at.index = 0;
  };
  auto load = [&](const Cursor& at, int stage) {
    if (at.head >= after) return;
    load_queries(stages + stage * STAGE, p.q, at.head, at.tiles.start(at.index));
    load_queries(stages + stage * STAGE + STAGE / 2, p.dout, at.head, at.tiles.start(at.index));
  };
  auto prepare_rows = [&](const Cursor& at, int stage) {
    if (at.head >= after) return;
    unsigned char* q = stages + stage * STAGE;
    float* shift = statistics + stage * 2 * BLOCK_Q;
    int m = at.tiles.start(at.index) + lane;
    int64_t row = b * p.lse_batch + at.head * p.lse_head + span(p.mask.query_starts, b, p.M).first + m;
    float lse = m < r.rows ? p.lse[row] : -INF, delta = m < r.rows ? p.delta[row] : 0.0f;
    prepare<T, D>(q, q + STAGE / 2, nullptr, shift, shift + BLOCK_Q, lse, delta, warp * (256 / D), WARPS * (256 / D), BLOCK_Q);
  };

  Slab<D, KEYS> slab;
  slab.clear();
  Cursor at{visit(kv * group), kv * group, -1};
  advance(at);
  load_keys(k_tile, p.k);
  load_keys(v_tile, p.v);
  load(at, 0);
  cp_async_commit();
  cp_async_wait<0>();
  block_barrier();
  prepare_rows(at, 0);
  for (int stage = 0; at.head < after; stage ^= 1) {
    block_barrier();
    Cursor next = at;
    advance(next);
    load(next, stage ^ 1);
    cp_async_commit();
#pragma unroll 1
    for (int block = 0; block < BLOCK_Q / 16; block++) {
      int m = at.tiles.start(at.index) + block * 16;
      Kind visible = kind<KEYS>(p.mask, r, m, n, at.tiles.listed(at.index, p.mask));
      if (visible == EMPTY) continue;
      const unsigned char* q = stages + stage * STAGE + block * 16 * D * 2;
      const float* shift = statistics + stage * 2 * BLOCK_Q + block * 16;
      unsigned char* p_tile = turned + warp * 2 * TURNED;
      add_queries<T, D, KEYS>(slab, {q, q + STAGE / 2, shift, shift + BLOCK_Q}, k_tile + warp * KEYS * D * 2,
                              v_tile + warp * KEYS * D * 2, p_tile, p_tile + TURNED, 1, p.scale, [&](float (&x)[KEYS / 8][4]) {
                                if (visible != FULL) hide<KEYS>(x, p.mask, r, b, at.head, m, n);
                              });
    }
    cp_async_wait<0>();
    block_barrier();
    prepare_rows(next, stage ^ 1);
    at = next;
  }
  keys = span(p.mask.key_starts, b, p.N);
  T* dk = static_cast<T*>(p.dk.data) + b * p.dk.batch + kv * p.dk.head + (keys.first + n) * p.dk.row;
  T* dv = static_cast<T*>(p.dv.data) + b * p.dv.batch + kv * p.dv.head + (keys.first + n) * p.dv.row;
  store_rows<T, D>(dk, p.dk.row, slab.dk[0], p.scale, keys.count - n);
  store_rows<T, D>(dv, p.dv.row, slab.dv[0], 1.0f, keys.count - n);
}

template <class T, int D>
const Kernel DQ{"attention_dq_kernel<" + std::string(T::NAME) + ", " + std::to_string(D) + ">", THREADS, DQ_BYTES<D>};
template <class T, int D>
const Kernel DKDV{"attention_dkdv_kernel<" + std::string(T::NAME) + ", " + std::to_string(D) + ">", THREADS, DKDV_BYTES<D>};

template <class T, int D>
void start(const AttentionBackward& p, uintptr_t stream) {
  int64_t query_blocks = static_cast<int64_t>(p.B) * p.H * ((p.M + BLOCK - 1) / BLOCK);
  int64_t key_blocks = static_cast<int64_t>(p.B) * p.Hkv * ((p.N + BLOCK - 1) / BLOCK);
  const Kernel &dq = DQ<T, D>, &dkdv = DKDV<T, D>;
  launch<attention_dq_kernel<T, D>>(dq.name.c_str(), {query_blocks, dq.threads, dq.shared_bytes, stream}, p);
  launch<attention_dkdv_kernel<T, D>>(dkdv.name.c_str(), {key_blocks, dkdv.threads, dkdv.shared_bytes, stream}, p);
}

template <class T>
void start(const AttentionBackward& p, uintptr_t stream) {
  if (p.D == 32) return start<T, 32>(p, stream);
  if (p.D == 64) return start<T, 64>(p, stream);
  if (p.D == 128) return start<T, 128>(p, stream);
  throw std::runtime_error("attention_backward: head dimension " + std::to_string(p.D) + " is not 32, 64 or 128");
}

}  // namespace

void attention_backward(const AttentionBackward& p, uintptr_t stream) {
  p.bfloat16 ? start<Bfloat16>(p, stream) : start<Half>(p, stream);
}

std::vector<Kernel> attention_backward_kernels() {
  return {DQ<Half, 32>,     DQ<Half, 64>,     DQ<Half, 128>,     DKDV<Half, 32>,     DKDV<Half, 64>,     DKDV<Half, 128>,
          DQ<Bfloat16, 32>, DQ<Bfloat16, 64>, DQ<Bfloat16, 128>, DKDV<Bfloat16, 32>, DKDV<Bfloat16, 64>, DKDV<Bfloat16, 128>};
}

}  // namespace fastattn
