// The tile instructions of AMX, for a processor that does not have them. This file is included before everything else
// (g++ -include). It includes the real intrinsics first and then gives their names to these functions, so that the
// sources need no change.
//
// They follow Intel's manual (SDM volume 2: LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TILERELEASE, TDPBF16PS). Where
// the processor would raise #GP or #UD, they print a sentence to stderr and abort().
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_emulation {

struct Config {  // the 64 bytes of LDTILECFG
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

struct Tile {
  alignas(64) uint32_t row[16][16];
};

inline thread_local Config config{};  // palette 0: no tile is configured
inline thread_local Tile tiles[8];
inline int defect = 0;  // 1: products with an odd k are lost, as on a broken processor

[[noreturn]] inline void fault(const char* instruction, const char* why) {
  std::fprintf(stderr, "amx_emulation: %s: %s\n", instruction, why);
  std::abort();
}

inline void loadconfig(const void* memory) {
  Config c;
  std::memcpy(&c, memory, sizeof c);
  if (c.palette > 1) fault("ldtilecfg", "there are palettes 0 and 1");
  for (const uint8_t byte : c.reserved)
    if (byte) fault("ldtilecfg", "a reserved byte is set");
  for (int t = 0; t < 16 && c.palette == 1; ++t) {
    if (t >= 8 && (c.rows[t] || c.row_bytes[t])) fault("ldtilecfg", "there are 8 tiles");
    if (c.rows[t] > 16 || c.row_bytes[t] > 64) fault("ldtilecfg", "a tile is at most 16 rows of 64 bytes");
    if (!c.rows[t] != !c.row_bytes[t]) fault("ldtilecfg", "rows without bytes, or bytes without rows");
  }
  if (c.palette == 0) c = {};
  config = c;
  std::memset(tiles, 0, sizeof tiles);
}

inline void release() {
  config = {};
  std::memset(tiles, 0, sizeof tiles);
}

inline void check(const char* instruction, int tile) {
  if (config.palette == 0) fault(instruction, "no tile is configured");
  if (tile < 0 || tile >= 8) fault(instruction, "there are 8 tiles");
  if (config.rows[tile] == 0) fault(instruction, "this tile is not configured");
  if (config.row_bytes[tile] % 4) fault(instruction, "a row is no multiple of 4 bytes");
  if (config.start_row) fault(instruction, "a restart in the middle of a tile is not modelled");
}

inline void zero(int tile) {
  check("tilezero", tile);
  std::memset(&tiles[tile], 0, sizeof(Tile));
}

inline void load(int tile, const void* base, int64_t stride) {
  check("tileloadd", tile);
  std::memset(&tiles[tile], 0, sizeof(Tile));
  for (int r = 0; r < config.rows[tile]; ++r)
    std::memcpy(tiles[tile].row[r], static_cast<const char*>(base) + r * stride, config.row_bytes[tile]);
}

inline void store(int tile, void* base, int64_t stride) {
  check("tilestored", tile);
  for (int r = 0; r < config.rows[tile]; ++r)
    std::memcpy(static_cast<char*>(base) + r * stride, tiles[tile].row[r], config.row_bytes[tile]);
}

// Compute one row of TDPBF16PS. The sum over even k and the sum over odd k start at zero and grow by one FMA per pair.
// Then they are added, and the result is added to C. The caller has set DAZ, FTZ and rounding to nearest for the vector
// instructions; TDPBF16PS always works in this way.
__attribute__((noinline, target("avx512f"))) inline void dot_row(uint32_t* c, const uint32_t* a, const Tile& b,
                                                                 int pairs, int columns) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
  for (int k = 0; k < pairs; ++k) {
    const __m512i ak = _mm512_set1_epi32(static_cast<int>(a[k])), bk = _mm512_load_si512(b.row[k]);
    even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(ak, 16)),
                           _mm512_castsi512_ps(_mm512_slli_epi32(bk, 16)), even);
    if (defect) continue;
    odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(ak, high)),
                          _mm512_castsi512_ps(_mm512_and_si512(bk, high)), odd);
  }
  const auto inside = static_cast<__mmask16>((1u << columns) - 1);
  const __m512 sum = _mm512_add_ps(_mm512_loadu_ps(c), _mm512_add_ps(even, odd));
  _mm512_storeu_ps(c, _mm512_maskz_mov_ps(inside, sum));
}

inline void dpbf16ps(int c, int a, int b) {
  for (const int tile : {c, a, b}) check("tdpbf16ps", tile);
  if (c == a || a == b || c == b) fault("tdpbf16ps", "its three tiles must differ");
  if (config.row_bytes[c] != config.row_bytes[b]) fault("tdpbf16ps", "C and B differ in their columns");
  if (config.rows[c] != config.rows[a]) fault("tdpbf16ps", "C and A differ in their rows");
  if (config.row_bytes[a] / 4 != config.rows[b]) fault("tdpbf16ps", "A's columns are not B's rows");
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x1f80 | 0x8000 | 0x0040);  // exceptions masked, to nearest even, FTZ, DAZ
  for (int m = 0; m < config.rows[c]; ++m)
    dot_row(tiles[c].row[m], tiles[a].row[m], tiles[b], config.rows[b], config.row_bytes[c] / 4);
  _mm_setcsr(before);
}

}  // namespace amx_emulation

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_emulation::loadconfig
#define _tile_release amx_emulation::release
#define _tile_zero amx_emulation::zero
#define _tile_loadd amx_emulation::load
#define _tile_stored amx_emulation::store
#define _tile_dpbf16ps amx_emulation::dpbf16ps
