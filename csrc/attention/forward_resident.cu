// Attention forward for heads of at most 288 keys: all scores of a query are in registers at once, so its
// softmax is one pass.
//
// Tile plan: a block takes `rows` queries of one head, all of them where they are few, and copies K, V and its part of Q to
// shared memory once: K and Q first, V while the first scores are computed. Each of its 4 to 8 warps then takes 16 queries at a
// time: Q K^T for the blocks of 16 keys in their run, the softmax, P V; there is nothing to rescale and no barrier after the
// first 16. Out goes through the rows of Q that it replaces. Shared memory: (2 round16(N) + rows) x D elements; with M = N = 77,
// 197 and 257 and D = 64 that is 30, 78 and 102 KB. Two capacities: 128 keys with 64 registers of scores, and 288 with 144.
//
// Bytes: q, k, v and out once, lse 4 per query, the minimum; k and v once per block where M needs several. MMA: 4 D FLOPs per
// pair on m16n8: queries are rounded up to 16; keys to 8, the last eight being the tail. So 77, 197 and 257 multiply 80 x 80, 208
// x 200 and 272 x 264, 8%, 7% and 9% more than they need; 50 multiplies 64 x 56, 43% more, the grid of the hardware. Per pair
// beside the MMA: one maximum, one fused multiply-add, one ex2, one addition, half a conversion, in whole blocks of 16 keys and
// the tail.
#include "forward.cuh"

namespace fastattn {
namespace {

constexpr int MOST_THREADS = 256;
constexpr int GROUP = 2;  // blocks of 16 keys that are multiplied together: 4 independent chains of products

struct Arguments {
  AttentionForward request;
  int rows;  // of a block
};

// Starts the copy of rows `first` to `last` of a tile by the whole block; a row that is not live becomes 0.
template <class T, int D, class Live>
DEVICE void load_rows(unsigned char* tile, const T* global, int64_t stride, bool aligned, int first, int last, Live live) {
  constexpr int CHUNKS = D / 8;
#pragma unroll 1  // more copies at a time would cost the registers of the loop below
  for (int i = first * CHUNKS + threadIdx.x; i < last * CHUNKS; i += blockDim.x) {
    int row = i / CHUNKS, chunk = i % CHUNKS;
    load_chunk<T, CHUNKS>(tile, global, stride, aligned, row, chunk, live(row) ? 8 : 0);
  }
}

// Eight keys from row n0 of the tiles on.
template <class T, int D>
DEVICE void tail_scores(float (&s)[4], const uint32_t (&q)[D / 16][4], const unsigned char* k_tile, int n0) {
#pragma unroll
  for (int e = 0; e < 4; e++) s[e] = 0;
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    uint32_t b[4];
    load_b<D / 8>(b, k_tile, n0, k * 2);
    mma_m16n8k16<T>(s, q[k], {b[0], b[1]});
  }
}

template <class T, int D>
DEVICE void tail_accumulate(Softmax<D>& state, const uint32_t (&weight)[2], const unsigned char* v_tile, int n0) {
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    uint32_t b[4];
    load_b_trans<D / 8>(b, v_tile, n0, i * 2);
    mma_m16n8k8<T>(state.out[2 * i], weight, b[0]);
    mma_m16n8k8<T>(state.out[2 * i + 1], weight, b[2]);
  }
}

// Which pairs of 16 queries are visible: in word i those of tile i, as `tile_pairs`; in `tail` those of the eight keys.
template <int KEYS>
struct Pairs {
  uint32_t words[(KEYS + MASK_TILE - 1) / MASK_TILE];
  uint32_t tail;
};

template <int KEYS>
DEVICE Pairs<KEYS> row_pairs(const Mask& mask, const MaskRows& rows, const RowBlocks& keys) {
  Pairs<KEYS> pairs;
#pragma unroll
  for (int i = 0; i * MASK_TILE < KEYS; i++) {
    Blocks blocks{keys.visited >> i * TILE_BLOCKS & 0xf, keys.full >> i * TILE_BLOCKS & 0xf};
    pairs.words[i] = tile_pairs(mask, rows, i * MASK_TILE, blocks);
  }
  pairs.tail = keys.tail < 0 ? 0 : visible_pairs(mask, rows, keys.tail) & 0xf;
  return pairs;
}

// Scores of BLOCKS x 16 keys from block i on, and their maxima.
template <class T, int D, int KEYS, int BLOCKS>
DEVICE void group_scores(float (*s)[4], Softmax<D>& state, const RowBlocks& keys, const Pairs<KEYS>& pairs,
                         const uint32_t (&q)[D / 16][4], const unsigned char* k_tile, int i) {
  uint32_t visited = keys.visited >> i & ((1u << BLOCKS) - 1);
  if (visited == 0) return;
  scores<T, D, BLOCKS>(s + 2 * i, q, k_tile, i * BLOCK, visited);
  hide<BLOCKS>(s + 2 * i, pairs.words[i / TILE_BLOCKS] >> i % TILE_BLOCKS * 8);
  raise_top<2 * BLOCKS>(state, s + 2 * i);
}

// Scores of 16 queries: s for whole blocks, `tail` for the eight keys behind them; and their maxima.
template <class T, int D, int KEYS>
DEVICE void all_scores(float (&s)[KEYS / 8][4], float (&tail)[4], Softmax<D>& state, const RowBlocks& keys,
                       const Pairs<KEYS>& pairs, const uint32_t (&q)[D / 16][4], const unsigned char* k_tile) {
#pragma unroll
  for (int i = 0; i + GROUP <= KEYS / BLOCK; i += GROUP) group_scores<T, D, KEYS, GROUP>(s, state, keys, pairs, q, k_tile, i);
  if constexpr (KEYS / BLOCK % GROUP != 0) group_scores<T, D, KEYS, 1>(s, state, keys, pairs, q, k_tile, KEYS / BLOCK - 1);
  if (keys.tail < 0) return;
  tail_scores<T, D>(tail, q, k_tile, keys.tail);
#pragma unroll
  for (int e = 0; e < 4; e++)
    if ((pairs.tail >> e & 1) == 0) tail[e] = -INF;
  raise_top<1>(state, &tail);
}

// Blocks of most threads that share a multiprocessor, for which registers are limited.
template <int D, int KEYS>
constexpr int SHARING = KEYS == CAPACITY_SMALL && D < 128 ? 2 : 1;

template <class T, int D, int KEYS>
KERNEL(MOST_THREADS, (SHARING<D, KEYS>))
attention_forward_resident_kernel(KERNEL_ARGUMENT Arguments arguments) {
  SHARED_MEMORY(shared);
  const AttentionForward& p = arguments.request;
  int parts = (p.M - 1) / arguments.rows + 1;
  int head = static_cast<int>(blockIdx.x / parts), b = head / p.H, h = head % p.H, kv = h / (p.H / p.Hkv);
  int m_block = static_cast<int>(blockIdx.x % parts) * arguments.rows;
  Span queries = span(p.mask.query_starts, b, p.M), keys = span(p.mask.key_starts, b, p.N);
  if (m_block >= queries.count) return;  // the grid is of the longest sequence
  int tiles = (min(arguments.rows, queries.count - m_block) + BLOCK - 1) / BLOCK;
  const T* q = static_cast<const T*>(p.q.data) + b * p.q.batch + h * p.q.head + (queries.first + m_block) * p.q.row;
  const T* k = static_cast<const T*>(p.k.data) + b * p.k.batch + kv * p.k.head + keys.first * p.k.row;
  const T* v = static_cast<const T*>(p.v.data) + b * p.v.batch + kv * p.v.head + keys.first * p.v.row;
  int room = (p.N + BLOCK - 1) / BLOCK * BLOCK;
  unsigned char *k_tile = shared, *v_tile = k_tile + room * D * 2, *q_tile = v_tile + room * D * 2;

  Bounds r = bounds(p.mask, b, queries.count, keys.count);
  Run run = block_run(p.mask, r, m_block, tiles * BLOCK);
  int first = run.first / BLOCK * BLOCK, last = (run.last + BLOCK - 1) / BLOCK * BLOCK;
  auto live = [&](int n) { return live_key(p.mask, r, b, n); };
  load_rows<T, D>(q_tile, q, p.q.row, p.aligned, 0, tiles * BLOCK,
                  [&](int row) { return live_query(p.mask, r, b, m_block + row); });
  load_rows<T, D>(k_tile, k, p.k.row, p.aligned, first, last, live);
  cp_async_commit();
  load_rows<T, D>(v_tile, v, p.v.row, p.aligned, first, last, live);
  cp_async_commit();
  cp_async_wait<1>();
  block_barrier();

  float factor = exponent_factor(p.scale);
  for (int begin = 0; begin < tiles; begin += blockDim.x / 32) {
    int tile = begin + threadIdx.x / 32, m0 = m_block + tile * BLOCK;
    unsigned char* q_rows = q_tile + tile * BLOCK * D * 2;
    float s[KEYS / 8][4], tail[4], shift[2];
    Softmax<D> state;
    clear(state);
    RowBlocks blocks{0, 0, -1};
    bool mine = tile * BLOCK < arguments.rows;  // beyond the sequence's end it visits nothing and stores nothing
    if (mine) blocks = row_blocks(p.mask, block_run(p.mask, r, m0, BLOCK), b, h, m0);
    if (blocks.visited != 0 || blocks.tail >= 0) {
      Pairs<KEYS> pairs = row_pairs<KEYS>(p.mask, mask_rows(p.mask, r, b, h, m0 + threadIdx.x % 32 / 4), blocks);
      uint32_t q_fragments[D / 16][4];
      load_queries<D>(q_fragments, q_rows, p.scale);
      all_scores<T, D, KEYS>(s, tail, state, blocks, pairs, q_fragments, k_tile);
    }
    share_top(shift, state, factor);
    if (begin == 0) {
      cp_async_wait<0>();
      block_barrier();
    }
    accumulate<T, D, KEYS / BLOCK>(state, s, shift, factor, v_tile, blocks.visited);
    if (blocks.tail >= 0) {
      uint32_t weight[2];
      weigh<T>(weight, state, tail, shift, factor);
      tail_accumulate<T, D>(state, weight, v_tile, blocks.tail);
    }
    if (mine) finish<T, D>(p, state, factor, q_rows, b, h, m0, r.rows);
  }
}

// Shared memory varies with the sizes; told is the most that a launch asks for on every device.
template <class T, int D, int KEYS>
const Kernel KERNEL_INFO{
    "attention_forward_resident_kernel<" + std::string(T::NAME) + ", " + std::to_string(D) + ", " + std::to_string(KEYS) + ">",
    MOST_THREADS, min(3 * KEYS * D * 2, 99 * 1024)};

template <class T, int D, int KEYS>
void start(const AttentionForward& p, const AttentionForwardConfig& config, uintptr_t stream) {
  int64_t blocks = static_cast<int64_t>(p.B) * p.H * ((p.M - 1) / config.rows + 1);
  Launch where{blocks, config.warps * 32, config.shared_bytes, stream};
  launch<attention_forward_resident_kernel<T, D, KEYS>>(KERNEL_INFO<T, D, KEYS>.name.c_str(), where, Arguments{p, config.rows});
}

template <class T, int D>
void start(const AttentionForward& p, const AttentionForwardConfig& config, uintptr_t stream) {
  config.capacity == CAPACITY ? start<T, D, CAPACITY>(p, config, stream) : start<T, D, CAPACITY_SMALL>(p, config, stream);
}

template <class T>
void start(const AttentionForward& p, const AttentionForwardConfig& config, uintptr_t stream) {
  if (p.D == 32) return start<T, 32>(p, config, stream);
  if (p.D == 64) return start<T, 64>(p, config, stream);
  return start<T, 128>(p, config, stream);
}

template <class T, int D>
std::vector<Kernel> kernels() {
  return {KERNEL_INFO<T, D, CAPACITY_SMALL>, KERNEL_INFO<T, D, CAPACITY>};
}

}  // namespace

void attention_forward_resident(const AttentionForward& p, const AttentionForwardConfig& config, uintptr_t stream) {
  p.bfloat16 ? start<Bfloat16>(p, config, stream) : start<Half>(p, config, stream);
}

std::vector<Kernel> attention_forward_resident_kernels() {
  std::vector<Kernel> all;
  for (const auto& some : {kernels<Half, 32>(), kernels<Half, 64>(), kernels<Half, 128>(), kernels<Bfloat16, 32>(),
                           kernels<Bfloat16, 64>(), kernels<Bfloat16, 128>()})
    all.insert(all.end(), some.begin(), some.end());
  return all;
}

}  // namespace fastattn
