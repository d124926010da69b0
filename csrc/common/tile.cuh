// Tiles of 16-bit elements in shared memory, and the three moves that kernels make with them: global to shared, shared to
// fragments of a matrix product, shared to global.
//
// A tile is ROWS x COLUMNS, stored by rows in chunks of 8 elements (16 bytes). Chunk c of row r lies at place c ^ swizzle(r) of
// its row, so that the 8 rows that one phase of ldmatrix reads fall into 8 different groups of banks, whatever the width.
#pragma once

#include "ptx.cuh"

namespace fastattn {

// Byte offset of a chunk in a tile whose rows have CHUNKS of them.
template <int CHUNKS>
DEVICE int chunk_offset(int row, int chunk) {
  static_assert(CHUNKS == 2 || CHUNKS == 4 || CHUNKS % 8 == 0, "four rows of 2 chunks, or one of 8, fill all banks once");
  constexpr unsigned PLACES = CHUNKS < 8 ? CHUNKS : 8;
  int swizzle = static_cast<int>(static_cast<unsigned>(row) / (8 / PLACES) % PLACES);
  return (row * CHUNKS + (chunk ^ swizzle)) * 16;
}

// Starts the copy of chunk `chunk` of row `row`: `elements` of its 8 exist, the others become 0. With `aligned`, rows start at
// multiples of 16 bytes and the copy is asynchronous; otherwise elements are moved one by one.
template <class T, int CHUNKS>
DEVICE void load_chunk(unsigned char* tile, const T* global, int64_t stride, bool aligned, int row, int chunk, int elements) {
  const T* from = global + row * stride + chunk * 8;
  unsigned char* to = tile + chunk_offset<CHUNKS>(row, chunk);
  if (aligned) {
    cp_async_16(to, from, elements * 2);
    return;
  }
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int e = 0; e < 8; e++)
    if (e < elements) words[e / 2] |= static_cast<uint32_t>(from[e].bits) << (16 * (e % 2));
  *reinterpret_cast<uint4*>(to) = uint4{words[0], words[1], words[2], words[3]};
}

// Starts the copy of a tile. `count(row, column)`: how many of the 8 elements from there on exist (0 to 8).
template <class T, int ROWS, int COLUMNS, int THREADS, class Count>
DEVICE void load_tile(unsigned char* tile, const T* global, int64_t stride, bool aligned, Count count) {
  constexpr int CHUNKS = COLUMNS / 8, PER_THREAD = ROWS * CHUNKS / THREADS;
  static_assert(ROWS * CHUNKS % THREADS == 0, "each thread copies the same number of chunks");
  auto load = [&](int i) {
    int index = threadIdx.x + i * THREADS, row = index / CHUNKS, chunk = index % CHUNKS;
    load_chunk<T, CHUNKS>(tile, global, stride, aligned, row, chunk, count(row, chunk * 8));
  };
  if (aligned) {
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) load(i);
  } else {
#pragma unroll 1
    for (int i = 0; i < PER_THREAD; i++) load(i);
  }
}

// The A operand of m16n8k16, 16 x 16 elements from (row, chunk) of a tile on.
template <int CHUNKS>
DEVICE void load_a(uint32_t (&a)[4], const unsigned char* tile, int row, int chunk) {
  int lane = threadIdx.x % 32;
  ldmatrix_x4(a, tile + chunk_offset<CHUNKS>(row + lane % 16, chunk + lane / 16));
}

// The A operand from a tile that holds its transpose: 16 (k) x 16 (m) elements from (row, chunk) on.
template <int CHUNKS>
DEVICE void load_a_trans(uint32_t (&a)[4], const unsigned char* tile, int row, int chunk) {
  int lane = threadIdx.x % 32;
  ldmatrix_x4_trans(a, tile + chunk_offset<CHUNKS>(row + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2));
}

// Two B operands, 16 (n) x 16 (k) elements of a tile whose rows are n: b[0..1] for its first 8 rows, b[2..3] for the others.
template <int CHUNKS>
DEVICE void load_b(uint32_t (&b)[4], const unsigned char* tile, int row, int chunk) {
  int lane = threadIdx.x % 32;
  ldmatrix_x4(b, tile + chunk_offset<CHUNKS>(row + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2));
}

// Two B operands, 16 (k) x 16 (n) elements of a tile whose rows are k: b[0..1] for its first 8 columns, b[2..3] for the others.
template <int CHUNKS>
DEVICE void load_b_trans(uint32_t (&b)[4], const unsigned char* tile, int row, int chunk) {
  int lane = threadIdx.x % 32;
  uint32_t r[4];  // the lanes' places are those of load_b, so that one set of offsets serves both
  ldmatrix_x4_trans(r, tile + chunk_offset<CHUNKS>(row + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2));
  b[0] = r[0], b[1] = r[2], b[2] = r[1], b[3] = r[3];
}

}  // namespace fastattn
