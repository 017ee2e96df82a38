// Compiled for AMX and AVX-512 as a whole: nothing may be included here that could emit inline functions.
#include "runtime/kernels/cpu/gemm_amx.h"

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace shoal::kernels::cpu {
namespace {

// A tile is 16 rows of 64 bytes: 16 x 32 of A, 32 x 16 of B (16 rows of pairs, which TDPBF16PS multiplies and
// adds), or 16 x 16 floats of C. Two by two tiles of C are computed at once.
constexpr int64_t kTile = 16;
constexpr int64_t kTileDepth = 32;
constexpr int64_t kTileElements = kTile * kTileDepth;
constexpr int64_t kBlock = 32;
// 32 rows of A at this depth are 32 KiB and stay in L1, while this many columns of B pass by from L2 (512
// KiB).
constexpr int64_t kDepthMax = 512;
constexpr int64_t kColumnsMax = 512;
// Rows of A that are packed at once: when A is stored transposed, each of its rows gives two lines' worth.
constexpr int64_t kPackedRows = 64;

inline int64_t RoundUp(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
// The lowest `count` bits, none below 0, all from 32 on.
inline __mmask32 Mask(int64_t count) {
  return static_cast<__mmask32>(count >= 32 ? 0xffffffffu : count <= 0 ? 0u : (1u << count) - 1);
}

// ---- Packing ----

// rows[i][j] <-> rows[j][i] of 32-bit elements.
inline void Transpose(__m512i (&rows)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const int low = i / 4 * 8 + i % 4;
    t[low] = _mm512_shuffle_i32x4(rows[low], rows[low + 4], 0x88);
    t[low + 4] = _mm512_shuffle_i32x4(rows[low], rows[low + 4], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// One tile of A, or of B stored transposed: `rows` x `depth` of a row-major matrix, zeros around.
inline void LoadRows(const uint16_t* from, int64_t ld, int64_t rows, int64_t depth, __m512i (&tile)[16]) {
  const __mmask32 mask = Mask(depth);
  if (rows >= kTile) {
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) tile[i] = _mm512_maskz_loadu_epi16(mask, from + i * ld);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) tile[i] = _mm512_maskz_loadu_epi16(i < rows ? mask : 0, from + i * ld);
  }
}

// Two tiles of B, or of A stored transposed, side by side: row q has the pairs of elements of rows 2q and 2q
// + 1 of `from`, for 32 columns of it.
inline void LoadPairs(const uint16_t* from, int64_t ld, int64_t depth, int64_t columns, __m512i (&left)[16],
                      __m512i (&right)[16]) {
  alignas(64) static constexpr uint16_t kLeft[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                     37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                     11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i to_left = _mm512_load_si512(kLeft);
  const __m512i to_right = _mm512_add_epi16(to_left, _mm512_set1_epi16(16));
  const __mmask32 mask = Mask(columns);
#pragma GCC unroll 16
  for (int q = 0; q < kTile; ++q) {
    const __m512i even = _mm512_maskz_loadu_epi16(2 * q < depth ? mask : 0, from + 2 * q * ld);
    const __m512i odd = _mm512_maskz_loadu_epi16(2 * q + 1 < depth ? mask : 0, from + (2 * q + 1) * ld);
    left[q] = _mm512_permutex2var_epi16(even, to_left, odd);
    right[q] = _mm512_permutex2var_epi16(even, to_right, odd);
  }
}

inline void StoreTile(const __m512i (&tile)[16], uint16_t* to) {
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) _mm512_store_si512(to + i * kTileDepth, tile[i]);
}

// A or B as tiles: `outer` is the rows of A, the columns of B.
struct Source {
  const uint16_t* data;
  int64_t ld;
  bool depth_is_contiguous;
  const uint16_t* At(int64_t outer, int64_t depth) const {
    return data + (depth_is_contiguous ? outer * ld + depth : depth * ld + outer);
  }
};

enum class Operand { kA, kB };

// Rows of A or columns of B from `outer`, `blocks` times 32 of them (those from outer_count on are zeros),
// each block as two rows of tiles, each `depth` long. Blocks inside, so that lines next to each other are
// read one after the other.
template <Operand kOperand>
void Pack(const Source& source, int64_t outer, int64_t outer_count, int64_t blocks, int64_t begin,
          int64_t depth, uint16_t* to) {
  const int64_t tiles = (depth + kTileDepth - 1) / kTileDepth;
  for (int64_t p = 0; p < tiles; ++p) {
    const int64_t left = depth - p * kTileDepth;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t count = outer_count - block * kBlock;
      const uint16_t* from = source.At(outer + block * kBlock, begin + p * kTileDepth);
      uint16_t* first = to + (2 * block * tiles + p) * kTileElements;
      __m512i low[16], high[16];
      if (source.depth_is_contiguous) {
        LoadRows(from, source.ld, count, left, low);
        LoadRows(from + kTile * source.ld, source.ld, count - kTile, left, high);
      } else {
        LoadPairs(from, source.ld, left, count, low, high);
      }
      // A has its depth along the rows of a tile, B down its columns.
      if (source.depth_is_contiguous == (kOperand == Operand::kB)) {
        Transpose(low);
        Transpose(high);
      }
      StoreTile(low, first);
      StoreTile(high, first + tiles * kTileElements);
    }
  }
}

// ---- Multiplying ----

// 32 x 32 elements of C at the depth of one pass.
struct Block {
  const uint16_t* a;  // First row of tiles; the second is a_second elements behind.
  int64_t a_second;
  int64_t a_tile;  // Elements from one tile to the next along the depth.
  int64_t a_row;   // Elements from row to row of a tile.
  const uint16_t* b;
  int64_t tiles;
  const float* begin_with;  // Null: zeros.
  int64_t begin_ld;
  float* to;
  int64_t to_ld;
};

inline void MultiplyBlock(const Block& block) {
  if (block.begin_with == nullptr) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    const float* low = block.begin_with + kTile * block.begin_ld;
    _tile_loadd(0, block.begin_with, block.begin_ld * 4);
    _tile_loadd(1, block.begin_with + kTile, block.begin_ld * 4);
    _tile_loadd(2, low, block.begin_ld * 4);
    _tile_loadd(3, low + kTile, block.begin_ld * 4);
  }
  const uint16_t* a = block.a;
  const uint16_t* b = block.b;
  const int64_t b_second = block.tiles * kTileElements;
  for (int64_t p = 0; p < block.tiles; ++p) {
    _tile_loadd(4, a, block.a_row * 2);
    _tile_loadd(6, b, kTileDepth * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + b_second, kTileDepth * 2);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + block.a_second, block.a_row * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    a += block.a_tile;
    b += kTileElements;
  }
  float* low = block.to + kTile * block.to_ld;
  _tile_stored(0, block.to, block.to_ld * 4);
  _tile_stored(1, block.to + kTile, block.to_ld * 4);
  _tile_stored(2, low, block.to_ld * 4);
  _tile_stored(3, low + kTile, block.to_ld * 4);
}

// Copies rows x columns (at most 32 x 32) between a dense 32 x 32 block and a matrix.
void LoadEdge(const float* from, int64_t ld, int64_t rows, int64_t columns, float* block) {
  for (int64_t i = 0; i < kBlock; ++i) {
    const __mmask32 mask = i < rows ? Mask(columns) : 0;
    const float* row = from + i * ld;
    _mm512_store_ps(block + i * kBlock, _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), row));
    _mm512_store_ps(block + i * kBlock + 16,
                    _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), row + 16));
  }
}

void StoreEdge(const float* block, int64_t rows, int64_t columns, float* to, int64_t ld) {
  const __mmask32 mask = Mask(columns);
  for (int64_t i = 0; i < rows; ++i) {
    const __m512 low = _mm512_load_ps(block + i * kBlock), high = _mm512_load_ps(block + i * kBlock + 16);
    _mm512_mask_storeu_ps(to + i * ld, static_cast<__mmask16>(mask), low);
    _mm512_mask_storeu_ps(to + i * ld + 16, static_cast<__mmask16>(mask >> 16), high);
  }
}

void StoreBf16(const float* block, int64_t rows, int64_t columns, uint16_t* to, int64_t ld) {
  const __mmask32 mask = Mask(columns);
  for (int64_t i = 0; i < rows; ++i) {
    const __m512bh both =
        _mm512_cvtne2ps_pbh(_mm512_load_ps(block + i * kBlock + 16), _mm512_load_ps(block + i * kBlock));
    _mm512_mask_storeu_epi16(to + i * ld, mask, (__m512i)both);
  }
}

// Where sums wait between passes over the depth when C is bf16, the packed operands, and a block for C's
// edges.
struct Scratch {
  float* sums;
  uint16_t* a;
  uint16_t* b;
  float* edge;
};

int64_t PanelDepth(int64_t k) { return Min(RoundUp(k, kTileDepth), kDepthMax); }
int64_t PanelColumns(int64_t n) { return Min(RoundUp(n, kBlock), kColumnsMax); }
int64_t SumsFloats(const AmxGemm& g) {
  return g.out_bf16 && g.k > kDepthMax ? RoundUp(g.m, kBlock) * PanelColumns(g.n) : 0;
}

// One pass: `depth` of k from `k_begin`, for the columns [column, column + columns) of c.
struct Pass {
  int64_t k_begin, depth, column, columns;
};

// The block of c at (row, pass.column + j); `block` has its operands.
void FinishBlock(const AmxGemm& g, const Pass& pass, int64_t row, int64_t j, const Scratch& s, Block block) {
  const int64_t rows = Min(kBlock, g.m - row), columns = Min(kBlock, pass.columns - j);
  const bool first = pass.k_begin == 0, last = pass.k_begin + pass.depth == g.k;
  const int64_t at = row * g.ldc + pass.column + j;
  if (g.out_bf16) {
    const int64_t sums_ld = PanelColumns(g.n);
    float* sums = s.sums + row * sums_ld + j;
    block.begin_with = first ? nullptr : sums;
    block.begin_ld = sums_ld;
    block.to = last ? s.edge : sums;
    block.to_ld = last ? kBlock : sums_ld;
    MultiplyBlock(block);
    if (last) StoreBf16(s.edge, rows, columns, static_cast<uint16_t*>(g.c) + at, g.ldc);
    return;
  }
  float* c = static_cast<float*>(g.c) + at;
  const bool whole = rows == kBlock && columns == kBlock;
  const bool add = g.accumulate || !first;
  if (add && !whole) LoadEdge(c, g.ldc, rows, columns, s.edge);
  block.to = whole ? c : s.edge;
  block.to_ld = whole ? g.ldc : kBlock;
  block.begin_with = add ? block.to : nullptr;
  block.begin_ld = block.to_ld;
  MultiplyBlock(block);
  if (!whole) StoreEdge(s.edge, rows, columns, c, g.ldc);
}

// The blocks of c in the rows [row, row + rows): at most kPackedRows, multiples of 32 unless the last.
void RunRows(const AmxGemm& g, const Pass& pass, int64_t row, int64_t rows, const Scratch& s) {
  const int64_t tiles = (pass.depth + kTileDepth - 1) / kTileDepth;
  const Source a = {g.a, g.lda, !g.transpose_a};
  // Whole tiles of a row-major A are loaded from where they are.
  const bool in_place = !g.transpose_a && pass.depth % kTileDepth == 0 && rows % kBlock == 0;
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  if (!in_place) Pack<Operand::kA>(a, row, rows, blocks, pass.k_begin, pass.depth, s.a);
  for (int64_t i = 0; i < blocks; ++i) {
    Block block = {};
    block.tiles = tiles;
    block.a = in_place ? a.At(row + i * kBlock, pass.k_begin) : s.a + 2 * i * tiles * kTileElements;
    block.a_row = in_place ? g.lda : kTileDepth;
    block.a_tile = in_place ? kTileDepth : kTileElements;
    block.a_second = in_place ? kTile * g.lda : tiles * kTileElements;
    for (int64_t j = 0; j < pass.columns; j += kBlock) {
      block.b = s.b + j * tiles * kTileDepth;
      FinishBlock(g, pass, row + i * kBlock, j, s, block);
    }
  }
}

void RunPass(const AmxGemm& g, const Pass& pass, const Scratch& s) {
  const Source b = {g.b, g.ldb, g.transpose_b};
  const int64_t blocks = (pass.columns + kBlock - 1) / kBlock;
  Pack<Operand::kB>(b, pass.column, pass.columns, blocks, pass.k_begin, pass.depth, s.b);
  const int64_t whole = g.m / kBlock * kBlock;
  for (int64_t row = 0; row < whole; row += kPackedRows)
    RunRows(g, pass, row, Min(kPackedRows, whole - row), s);
  if (whole < g.m) RunRows(g, pass, whole, g.m - whole, s);
}

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

bool AskForAmx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kAmxBf16) == 0 || (d & kAmxTile) == 0)
    return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA.
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool HasAmx() {
  static const bool has = AskForAmx();
  return has;
}

int64_t AmxScratchBytes(const AmxGemm& g) {
  return SumsFloats(g) * 4 + (kPackedRows + PanelColumns(g.n)) * PanelDepth(g.k) * 2 + kBlock * kBlock * 4;
}

void AmxMultiply(const AmxGemm& g, void* scratch) {
  Scratch s;
  s.sums = static_cast<float*>(scratch);
  s.edge = s.sums + SumsFloats(g);
  s.a = reinterpret_cast<uint16_t*>(s.edge + kBlock * kBlock);
  s.b = s.a + kPackedRows * PanelDepth(g.k);
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t column = 0; column < g.n; column += kColumnsMax) {
    for (int64_t k = 0; k < g.k; k += kDepthMax) {
      RunPass(g, {k, Min(kDepthMax, g.k - k), column, Min(kColumnsMax, g.n - column)}, s);
    }
  }
  _tile_release();
}

}  // namespace shoal::kernels::cpu
