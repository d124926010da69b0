// Which keys a warp visits with its 16 queries, and which of them without a mask. Kernels and attention_forward_blocks, with
// which tests count the work on the host, run this same code.
#pragma once

#include "mask.cuh"

namespace fastattn {

constexpr int BLOCK = 16;                       // queries of a warp, and keys of a step
constexpr int TILE_BLOCKS = MASK_TILE / BLOCK;  // blocks of keys in a tile
constexpr int CAPACITY_SMALL = 128;             // keys of a resident head
constexpr int CAPACITY = 288;

// The tiles of 64 keys for some queries: a run of them, or the mask's list.
struct KeyTiles {
  const int32_t* listed;
  int first, count;
  int partial;  // of a list, the number of tiles that hide some pair; they come first
};

// Block i: the keys 16 i to 16 i + 15 of a tile. Bit i: it holds visible pairs; it hides none of its pairs.
struct Blocks {
  uint32_t visited, full;
};

// The same for up to 32 blocks from key 0 on. `tail`: the first of eight more keys, behind them and masked, or -1.
struct RowBlocks {
  uint32_t visited, full;
  int tail;
};

HOST_DEVICE KeyTiles key_tiles(const Mask& mask, const Run& run, int b, int h, int m0) {
  if (run.last <= run.first) return {nullptr, 0, 0, 0};
  const TileLists& lists = mask.key_tiles;
  if (lists.data == nullptr) {
    int first = run.first / MASK_TILE;
    return {nullptr, first, (run.last + MASK_TILE - 1) / MASK_TILE - first, 0};
  }
  const int32_t* list = lists.data + b * lists.batch + h * lists.head + m0 / MASK_TILE * lists.row;
  return {list + 2, 0, list[0] + list[1], list[0]};
}

HOST_DEVICE int tile_at(const KeyTiles& tiles, int i) { return tiles.listed == nullptr ? tiles.first + i : tiles.listed[i]; }

HOST_DEVICE uint32_t bits_between(int first, int last) { return last <= first ? 0 : (1u << last) - (1u << first); }

// Of the i-th tile, for queries whose run is `run`: the same as that of `tiles`, or a part of it.
HOST_DEVICE Blocks tile_blocks(const Mask& mask, const KeyTiles& tiles, int i, const Run& run) {
  if (run.last <= run.first) return {0, 0};
  int n0 = tile_at(tiles, i) * MASK_TILE;
  bool bounded = mask.keys == nullptr && mask.ids == nullptr && mask.bits == nullptr;
  bool may_be_full = tiles.listed == nullptr ? bounded : i >= tiles.partial;
  Blocks blocks;
  blocks.visited = bits_between(max(run.first - n0, 0) / BLOCK, min((run.last - n0 + BLOCK - 1) / BLOCK, TILE_BLOCKS));
  blocks.full = bits_between((max(run.full_first - n0, 0) + BLOCK - 1) / BLOCK, min((run.full_last - n0) / BLOCK, TILE_BLOCKS));
  blocks.full = may_be_full ? blocks.full & blocks.visited : 0;
  return blocks;
}

// Of all tiles, for a head of at most `capacity` keys and the 16 queries from m0 on.
HOST_DEVICE RowBlocks row_blocks(const Mask& mask, const Run& run, int b, int h, int m0) {
  RowBlocks all{0, 0, -1};
  KeyTiles tiles = key_tiles(mask, run, b, h, m0);
  for (int i = 0; i < tiles.count; i++) {
    Blocks blocks = tile_blocks(mask, tiles, i, run);
    all.visited |= blocks.visited << tile_at(tiles, i) * TILE_BLOCKS;
    all.full |= blocks.full << tile_at(tiles, i) * TILE_BLOCKS;
  }
  int last = run.last / BLOCK, over = run.last % BLOCK;
  if (over >= 1 && over <= 8 && (all.visited >> last & 1) != 0) {  // half a block is enough
    all.visited &= ~(1u << last);
    all.tail = last * BLOCK;
  }
  return all;
}

}  // namespace fastattn
