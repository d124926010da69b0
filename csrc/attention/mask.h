// The requests of the attention kernels, as plain data: tensors of heads, and which pairs a mask leaves visible.
#pragma once

#include <cstdint>

namespace fastattn {

constexpr int MASK_TILE = 64;  // queries and keys of a listed tile

// A (B, H, L, D) tensor of fp16 or bf16. Strides are in elements; the last is 1.
struct Heads {
  void* data;
  int64_t batch, head, row;
};

// A list of tiles: (B, H, T, 2 + U) int32, where row t holds the number of partial and of full tiles, then the indices of the
// partial ones, then those of the full ones, each ascending. A stride is 0 where the dimension is 1.
struct TileLists {
  const int32_t* data;
  int64_t batch, head, row;
};

// Packed sequences: of the `rows` of a (1, H, rows, D) tensor, sequence b has those from starts[b] up to starts[b + 1], whose
// values are not trusted. Without `data`, tensors are (B, H, L, D) and each sequence has all of its own L rows.
struct Starts {
  const int32_t* data;
  int rows;
};

// Pair (i, j) of sequence b, head h is visible iff all hold; what is null or not set holds.
struct Mask {
  bool has_low, has_high;
  int low, high;          // low <= j - i <= high
  const int32_t* prefix;  // j < prefix[b] or j - i <= prefix_high
  int prefix_high;
  const int32_t *key_begin, *key_end, *query_end;  // key_begin[b] <= j < key_end[b], i < query_end[b]
  const uint8_t* keys;                             // keys[b, j]
  int64_t keys_batch, keys_key;
  const int32_t *ids, *key_ids;  // ids[b, i] == key_ids[b, j] >= 0; both or neither
  int64_t ids_batch, ids_query, key_ids_batch, key_ids_key;
  const int32_t* bits;  // bit j % 32 of bits[b, h, i, j / 32]; a stride is 0 where the dimension is 1
  int64_t bits_batch, bits_head, bits_row, bits_word;
  TileLists key_tiles, query_tiles;  // with ids or bits: the tiles of keys for MASK_TILE queries, and of queries for keys
  Starts query_starts, key_starts;   // both or neither; i and j count from 0 in each sequence
};

}  // namespace fastattn
