// Products on the matrix unit of processors with AMX; compiled in where MANYICL_AMX is defined, and elsewhere never called.
//
// A tile register holds 16 rows of 64 bytes. `_tile_dpbf16ps` adds to C [16, 16] fp32 the product of A, 16 rows of 16 pairs, and
// B, 16 pairs of 16 columns, packed as in tiles.h. Two tiles of A meet two of B, so that each is used twice once it is loaded.

#pragma once

#include <cstdint>

#ifdef MANYICL_AMX

#include <immintrin.h>

constexpr bool kHasAmx = true;

// As long as it lives, the thread's tile registers are in use and all of the full shape.
class TileRegisters {
  public:
    TileRegisters() {
        alignas(64) uint8_t config[64] = {1};  // The palette; then at 16 the bytes of a row, as 16 bits, and at 48 the rows.
        for (int tile = 0; tile < 8; ++tile) {
            config[16 + 2 * tile] = 64;
            config[48 + tile] = 16;
        }
        asm volatile("" : : "r"(config) : "memory");  // GCC 12 does not know that all of it is read.
        _tile_loadconfig(config);
    }

    ~TileRegisters() { _tile_release(); }
};

// C of (16 or 32) x (16 or 32); rows and steps of all three count 32-bit words.
template <bool kTwoRows, bool kTwoColumns>
inline void multiply_tiles(
    const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_step, int64_t steps, float* c, int64_t c_row, bool adds) {
    const uint32_t* low = a + 16 * a_row;
    float* under = c + 16 * c_row;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (adds) {
        _tile_loadd(0, c, c_row * 4);
        if constexpr (kTwoColumns) _tile_loadd(1, c + 16, c_row * 4);
        if constexpr (kTwoRows) _tile_loadd(2, under, c_row * 4);
        if constexpr (kTwoRows && kTwoColumns) _tile_loadd(3, under + 16, c_row * 4);
    }
    for (int64_t step = 0; step < steps; step += 16) {
        _tile_loadd(4, a + step, a_row * 4);
        _tile_loadd(6, b + step * b_step, b_step * 4);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kTwoColumns) {
            _tile_loadd(7, b + step * b_step + 16, b_step * 4);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (kTwoRows) {
            _tile_loadd(5, low + step, a_row * 4);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (kTwoRows && kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_row * 4);
    if constexpr (kTwoColumns) _tile_stored(1, c + 16, c_row * 4);
    if constexpr (kTwoRows) _tile_stored(2, under, c_row * 4);
    if constexpr (kTwoRows && kTwoColumns) _tile_stored(3, under + 16, c_row * 4);
}

// C [rows, columns] = or += A [rows, 2 steps] · B [2 steps, columns]. Columns are a multiple of 16, steps too. Rows are rounded
// up to one: A and C have room for them, whatever stands there.
inline void multiply_block(
    const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_step, int64_t steps, int64_t rows, int64_t columns, float* c,
    int64_t c_row, bool adds) {
    asm volatile("" ::: "memory");  // GCC 12 does not know that loading a tile reads memory.
    for (int64_t row = 0; row < rows; row += 32) {
        for (int64_t column = 0; column < columns; column += 32) {
            const uint32_t* left = a + row * a_row;
            const uint32_t* right = b + column;
            float* target = c + row * c_row + column;
            const bool two_rows = row + 16 < rows, two_columns = column + 16 < columns;
            const auto product = two_rows ? two_columns ? multiply_tiles<true, true> : multiply_tiles<true, false>
                                 : two_columns ? multiply_tiles<false, true>
                                               : multiply_tiles<false, false>;
            product(left, a_row, right, b_step, steps, target, c_row, adds);
        }
    }
}

#else

constexpr bool kHasAmx = false;

class TileRegisters {};

void multiply_block(
    const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_step, int64_t steps, int64_t rows, int64_t columns, float* c,
    int64_t c_row, bool adds);

#endif
