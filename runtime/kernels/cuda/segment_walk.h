// The rows of experts as device memory lists them (matmul.h), and the tiles of a product over them, which blocks find from the counts:
// the host need not know them.
#pragma once

#include "runtime/kernels/cuda/launch.h"

namespace shoal::cuda {

// The segments in their order, 32 at a time, one in each lane; all lanes of a warp call together.
struct SegmentWindow {
  const int32_t* segments = nullptr;  // [count, 3]: expert, begin, rows. Null: one segment, `whole` rows of expert 0.
  int32_t count = 0;
  int32_t whole = 0;
  int32_t first = -32;
  int32_t expert = 0, begin = 0, rows = 0;  // Of this lane's segment; rows 0: none.

  __device__ bool Advance() {
    first += 32;
    if (segments == nullptr) {
      rows = threadIdx.x % 32 == 0 ? whole : 0;
      return first == 0;
    }
    if (first >= count) return false;
    const int32_t own = first + static_cast<int32_t>(threadIdx.x) % 32;
    rows = own < count ? segments[3 * own + 2] : 0;
    expert = own < count ? segments[3 * own] : 0;
    begin = own < count ? segments[3 * own + 1] : 0;
    return true;
  }
};

__device__ __forceinline__ int64_t From(int64_t value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
__device__ __forceinline__ int32_t From(int32_t value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// Finds tiles of segments by their number over all segments. Numbers asked for may not fall.
class TileWalk {
 public:
  struct Tile {
    int32_t expert, begin, rows;  // The segment.
    int64_t tile;                 // Within it.
  };
  // A segment of r rows has ceil(r / tile_rows) * tiles_per_row of them.
  __device__ TileWalk(SegmentWindow window, int tile_rows, int64_t tiles_per_row)
      : window_(window), tile_rows_(tile_rows), tiles_per_row_(tiles_per_row) {}

  __device__ bool Find(int64_t number, Tile& found) {
    while (number >= before_ + in_window_) {
      before_ += in_window_;
      if (!window_.Advance()) return false;
      through_ = Blocks(window_.rows, tile_rows_) * tiles_per_row_;
      const int lane = static_cast<int>(threadIdx.x) % 32;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int64_t other = __shfl_up_sync(0xffffffffu, through_, static_cast<unsigned>(distance));
        if (lane >= distance) through_ += other;
      }
      in_window_ = From(through_, 31);
    }
    const int64_t local = number - before_;
    const int lane = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, through_ > local))) - 1;
    found = {From(window_.expert, lane), From(window_.begin, lane), From(window_.rows, lane), 0};
    found.tile = local - (From(through_, lane) - Blocks(found.rows, tile_rows_) * tiles_per_row_);
    return true;
  }

 private:
  SegmentWindow window_;
  int tile_rows_;
  int64_t tiles_per_row_;
  int64_t before_ = 0;  // Tiles of earlier windows.
  int64_t in_window_ = 0;
  int64_t through_ = 0;  // Tiles of the window up to this lane's segment, its own among them.
};

}  // namespace shoal::cuda
