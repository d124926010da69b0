// Attention backward of short sequences in one kernel: dQ, dK and dV from q, k, v, out, dout and lse, with nothing in between in
// global memory and nothing added across blocks. For sm_80 and up.
//
// Tile plan: a block takes one head of k and v, keeps all its keys in shared memory, and walks over the queries of every head
// that reads it, in tiles of 32. Each of its warps (as many as the keys need, at most 8) owns a slab of 32 keys, or 16 where D is
// 128, and holds dK and dV of it in registers, 128 of them a thread (64 for D = 32). Of a tile of queries each warp makes P and
// dS of its slab, turns them round through shared memory and adds to dV and dK; after a barrier the warps share out dQ = dS K
// among them by 16 x 16 outputs, each the full sum over the keys, while rowsum(dO * O) of the next tile is made. Q and dO have
// two stages of asynchronous copies, O one. Shared memory for N = 50, 77, 128, 197, 256 and D = 64: 42.5, 53.5, 64.5, 97.5 and
// 108.5 KB.
//
// Bytes: each of q, k, v, out and dout is read once and each of dq, dk and dv written once, 16 D S per head with M = N = S, and
// 4 S for lse: the least there is. MMA: 10 D FLOPs per pair, the least too, with queries and keys rounded up to 16 and pairs
// skipped by 16 queries x slab. Fragments come from shared memory, 26 loads of 512 bytes for 40 products of m16n8k16 where a slab
// is 32 keys.
//
// A hidden pair is selected to 0. What a hidden key, or a query that sees no key, holds (NaN too) reaches nothing: both are read
// as 0.
#include "backward.cuh"

#include <stdexcept>

namespace fastattn {
namespace {

constexpr int MAX_WARPS = 8;
template <int D>
constexpr int SLAB_KEYS = D == 128 ? 16 : 32;

template <int D>
constexpr int TILE = BLOCK_Q * D * 2;  // bytes of 32 queries
// Bytes of shared memory for each warp: k, v, dS of 32 queries, P of 16; and those for the block: two stages of Q and dO, O, two
// stages of shift and delta.
template <int D>
constexpr int WARP_BYTES = SLAB_KEYS<D> * (2 * D + BLOCK_Q + 16) * 2;
template <int D>
constexpr int BLOCK_BYTES = 5 * TILE<D> + 2 * 2 * BLOCK_Q * 4;

// Which slabs 16 queries visit, and in which of them nothing is hidden: a bit for each.
struct Slabs {
  uint32_t visited, full;
};

template <int KEYS>
DEVICE Slabs visited_slabs(const Mask& mask, const Bounds& r, int b, int h, int m0, int warps) {
  int slab = threadIdx.x % 32, n0 = slab * KEYS;
  Kind visible = EMPTY;
  if (slab < warps && m0 < r.rows) visible = kind<KEYS>(mask, r, m0, n0, listed(mask, b, h, m0 / MASK_TILE, n0 / MASK_TILE));
  return {vote_ballot(visible != EMPTY), vote_ballot(visible == FULL)};
}

// Starts the copy of `rows` rows by all threads of the block; those that do not exist become 0.
template <class T, int D, class Exists>
DEVICE void load_rows(unsigned char* tile, const T* global, int64_t stride, int rows, bool aligned, Exists exists) {
  for (int i = threadIdx.x; i < rows * (D / 8); i += blockDim.x) {
    int row = i / (D / 8), chunk = i % (D / 8);
    load_chunk<T, D / 8>(tile, global, stride, aligned, row, chunk, exists(row) ? 8 : 0);
  }
}

// 16 x 16 elements of dS K from column chunk `chunk` on. `ds` is the first slab's tile of 16 x KEYS. Each 16 keys of a slab have
// sums of their own, so that one product need not wait for the other.
template <class T, int D>
DEVICE void query_gradient(float (&acc)[2][4], const unsigned char* ds, const unsigned char* k_tile, uint32_t slabs, int chunk,
                           int N) {
  constexpr int KEYS = SLAB_KEYS<D>;
  float sums[KEYS / 16][2][4] = {};
  for (int slab = 0; slabs >> slab != 0; slab++)
    if (slabs >> slab & 1) {
#pragma unroll
      for (int j = 0; j < KEYS / 16; j++)
        if (slab * KEYS + j * 16 < N) {
          uint32_t a[4], b[4];
          load_a<KEYS / 8>(a, ds + slab * BLOCK_Q * KEYS * 2, 0, j * 2);
          load_b_trans<D / 8>(b, k_tile, slab * KEYS + j * 16, chunk);
          mma_m16n8k16<T>(sums[j][0], a, {b[0], b[1]});
          mma_m16n8k16<T>(sums[j][1], a, {b[2], b[3]});
        }
    }
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) acc[i][e] = KEYS == 32 ? sums[0][i][e] + sums[KEYS / 16 - 1][i][e] : sums[0][i][e];
}

// Zeros in the rows [first, last) of a head.
template <class T, int D>
DEVICE void clear_rows(T* global, int64_t stride, int first, int last) {
  for (int i = first * (D / 8) + threadIdx.x; i < last * (D / 8); i += blockDim.x)
    *reinterpret_cast<uint4*>(global + i / (D / 8) * stride + i % (D / 8) * 8) = uint4{0, 0, 0, 0};
}

template <class T, int D>
KERNEL(32 * MAX_WARPS, 1)
attention_backward_single_kernel(KERNEL_ARGUMENT AttentionBackward p) {
  SHARED_MEMORY(shared);
  constexpr int KEYS = SLAB_KEYS<D>, ROWS = 16 * D * 2, DS_TILE = BLOCK_Q * KEYS * 2;
  int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, n0 = warp * KEYS;
  unsigned char *k_tile = shared, *v_tile = k_tile + warps * KEYS * D * 2, *query_tiles = v_tile + warps * KEYS * D * 2;
  unsigned char *out_tile = query_tiles + 4 * TILE<D>, *ds_tiles = out_tile + TILE<D>;
  unsigned char* p_tile = ds_tiles + warps * DS_TILE + warp * DS_TILE / 2;
  float* statistics = reinterpret_cast<float*>(ds_tiles + warps * (DS_TILE + DS_TILE / 2));
  auto q_tile = [&](int stage) { return query_tiles + stage * 2 * TILE<D>; };
  auto do_tile = [&](int stage) { return q_tile(stage) + TILE<D>; };
  auto shift = [&](int stage) { return statistics + stage * 2 * BLOCK_Q; };
  auto delta = [&](int stage) { return shift(stage) + BLOCK_Q; };

  int b = static_cast<int>(blockIdx.x) / p.Hkv, kv = static_cast<int>(blockIdx.x) % p.Hkv, group = p.H / p.Hkv;
  Span queries = span(p.mask.query_starts, b, p.M), keys = span(p.mask.key_starts, b, p.N);
  Bounds r = bounds(p.mask, b, queries.count, keys.count);
  Run run{0, 0, 0, 0};
  if (r.begin < r.end) run = query_run(p.mask, r, r.begin, r.end - 1);
  int first = run.first / BLOCK_Q * BLOCK_Q, tiles = max(run.last - first + BLOCK_Q - 1, 0) / BLOCK_Q, steps = group * tiles;

  auto head_of = [&](int step) { return kv * group + step / tiles; };
  auto rows_of = [&](int step) { return first + step % tiles * BLOCK_Q; };
  auto rows = [&](const Heads& x, const Span& of, int h, int row) {
    return static_cast<T*>(x.data) + b * x.batch + h * x.head + (of.first + row) * x.row;
  };
  auto load_keys = [&](unsigned char* tile, const Heads& x) {
    load_rows<T, D>(tile, rows(x, keys, kv, 0), x.row, warps * KEYS, p.aligned,
                    [&](int row) { return live_key(p.mask, r, b, row); });
  };
  auto load_queries = [&](int step) {
    int h = head_of(step), m0 = rows_of(step);
    auto live = [&](int row) { return m0 + row < r.rows; };
    load_rows<T, D>(q_tile(step % 2), rows(p.q, queries, h, m0), p.q.row, BLOCK_Q, p.aligned, live);
    load_rows<T, D>(do_tile(step % 2), rows(p.dout, queries, h, m0), p.dout.row, BLOCK_Q, p.aligned, live);
    load_rows<T, D>(out_tile, rows(p.out, queries, h, m0), p.out.row, BLOCK_Q, p.aligned, live);
  };
  // lse and dlse of a tile's rows, one in each lane of every warp
  float lse = -INF, dlse = 0;
  auto load_statistics = [&](int step) {
    int m = rows_of(step) + lane;
    int64_t row = b * p.lse_batch + head_of(step) * p.lse_head + queries.first + m;
    lse = m < r.rows ? p.lse[row] : -INF;
    dlse = m < r.rows && p.dlse != nullptr ? p.dlse[row] : 0.0f;
  };
  auto prepare_rows = [&](int stage) {
    prepare<T, D>(q_tile(stage), do_tile(stage), out_tile, shift(stage), delta(stage), lse, dlse, warp * (256 / D),
                  warps * (256 / D), BLOCK_Q);
  };

  Slab<D, KEYS> slab;
  slab.clear();
  if (steps > 0) {
    load_keys(k_tile, p.k);
    load_keys(v_tile, p.v);
    load_queries(0);
    cp_async_commit();
    load_statistics(0);
    cp_async_wait<0>();
    block_barrier();
    prepare_rows(0);
  }
  for (int step = 0; step < steps; step++) {
    int h = head_of(step), m0 = rows_of(step), stage = step % 2;
    block_barrier();  // the tile is prepared; dQ of the last one has been made
    if (step + 1 < steps) load_queries(step + 1);
    cp_async_commit();
    uint32_t visited[2];
#pragma unroll
    for (int block = 0; block < 2; block++) {
      int m = m0 + block * 16;
      Slabs slabs = visited_slabs<KEYS>(p.mask, r, b, h, m, warps);
      visited[block] = slabs.visited;
      if ((slabs.visited >> warp & 1) == 0) continue;
      Queries x{q_tile(stage) + block * ROWS, do_tile(stage) + block * ROWS, shift(stage) + block * 16,
                delta(stage) + block * 16};
      add_queries<T, D, KEYS>(slab, x, k_tile + n0 * D * 2, v_tile + n0 * D * 2, p_tile,
                              ds_tiles + warp * DS_TILE + block * 16 * KEYS * 2, (r.end - n0 + 15) / 16, p.scale,
                              [&](float (&weight)[KEYS / 8][4]) {
                                if ((slabs.full >> warp & 1) == 0) hide<KEYS>(weight, p.mask, r, b, h, m, n0);
                              });
    }
    cp_async_wait<0>();
    block_barrier();  // dS is complete; the next tile is there
    if (step + 1 < steps) load_statistics(step + 1);
    for (int task = warp; task < 2 * (D / 16); task += warps) {
      int block = task / (D / 16), column = task % (D / 16) * 16;
      float acc[2][4];
      query_gradient<T, D>(acc, ds_tiles + block * 16 * KEYS * 2, k_tile, block == 0 ? visited[0] : visited[1], column / 8,
                           r.end);
      int m = m0 + block * 16;
      store_rows<T, 16>(rows(p.dq, queries, h, m) + column, p.dq.row, acc, p.scale, r.rows - m);
    }
    if (step + 1 < steps) prepare_rows(stage ^ 1);
  }
  queries = span(p.mask.query_starts, b, p.M), keys = span(p.mask.key_starts, b, p.N);
  for (int h = kv * group; h < (kv + 1) * group; h++) {  // queries that see no key by the bounds
    T* dq = rows(p.dq, queries, h, 0);
    clear_rows<T, D>(dq, p.dq.row, 0, min(first, queries.count));
    clear_rows<T, D>(dq, p.dq.row, min(first + tiles * BLOCK_Q, max(r.rows, 0)), queries.count);
  }
#pragma unroll
  for (int j = 0; j < KEYS / 16; j++) {
    int n = n0 + j * 16;
    store_rows<T, D>(rows(p.dk, keys, kv, n), p.dk.row, slab.dk[j], p.scale, keys.count - n);
    store_rows<T, D>(rows(p.dv, keys, kv, n), p.dv.row, slab.dv[j], 1.0f, keys.count - n);
  }
}

template <class T, int D>
const Kernel SINGLE{"attention_backward_single_kernel<" + std::string(T::NAME) + ", " + std::to_string(D) + ">", 32 * MAX_WARPS,
                    MAX_WARPS * WARP_BYTES<D> + BLOCK_BYTES<D>};

template <class T, int D>
void start(const AttentionBackward& p, uintptr_t stream) {
  const Kernel& kernel = SINGLE<T, D>;
  int warps = (p.N + SLAB_KEYS<D> - 1) / SLAB_KEYS<D>;
  if (warps > MAX_WARPS) throw std::runtime_error(kernel.name + ": " + std::to_string(p.N) + " keys are too many");
  launch<attention_backward_single_kernel<T, D>>(
      kernel.name.c_str(), {static_cast<int64_t>(p.B) * p.Hkv, 32 * warps, warps * WARP_BYTES<D> + BLOCK_BYTES<D>, stream}, p);
}

template <class T>
void start(const AttentionBackward& p, uintptr_t stream) {
  if (p.D == 32) return start<T, 32>(p, stream);
  if (p.D == 64) return start<T, 64>(p, stream);
  if (p.D == 128) return start<T, 128>(p, stream);
  throw std::runtime_error("attention_backward_single: head dimension " + std::to_string(p.D) + " is not 32, 64 or 128");
}

}  // namespace

void attention_backward_single(const AttentionBackward& p, uintptr_t stream) {
  p.bfloat16 ? start<Bfloat16>(p, stream) : start<Half>(p, stream);
}

std::vector<Kernel> attention_backward_single_kernels() {
  return {SINGLE<Half, 32>,     SINGLE<Half, 64>,     SINGLE<Half, 128>,
          SINGLE<Bfloat16, 32>, SINGLE<Bfloat16, 64>, SINGLE<Bfloat16, 128>};
}

}  // namespace fastattn
