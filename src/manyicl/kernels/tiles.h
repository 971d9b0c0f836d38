// The pieces from which attention is built, for AVX-512 with bf16 dot products, and with AMX where there is that (amx.h).
//
// Without AMX a product C[R, 16 V] += A[R, 2 S] · B[2 S, 16 V] goes through one register tile: `_mm512_dpbf16_ps` multiplies
// pairs of bf16 and adds both products to an fp32 lane, so the reduced dimension comes in pairs. A pair of A is one 32-bit word,
// broadcast; B is packed so that a vector holds the pairs of 16 neighbouring columns:
//
//     packed B   [S pairs][columns][2]
//
// 6 x 4 accumulators, 4 vectors of B and one of A fill 29 of the 32 registers.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#include "amx.h"
#include "attention.h"

constexpr int64_t kLanes = 16;
constexpr int64_t kVectorRows = 6;
constexpr int64_t kTileVectors = 4;
constexpr int64_t kTileRows = kHasAmx ? 32 : kVectorRows;  // query rows that are worked on together
constexpr int64_t kStep = kHasAmx ? 32 : kLanes;           // multiple to which lengths are filled up
constexpr int64_t kPanel = kLanes * kTileVectors;  // columns of B that one tile covers
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

#define ALWAYS_INLINE inline __attribute__((always_inline))

constexpr int64_t round_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

// Elements that a row of D takes in buffers, those past D being zero.
constexpr int64_t width_of(int64_t size) { return kHasAmx ? round_up(size, kStep) : size; }

inline void copy_row(bf16* target, const bf16* row, int64_t size) {
    std::memcpy(target, row, size * sizeof(bf16));
    std::memset(target + size, 0, (width_of(size) - size) * sizeof(bf16));
}

// Memory of one thread, kept from call to call and only ever grown.
class Scratch {
  public:
    ~Scratch() { std::free(data_); }

    char* reserve(size_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = 0;
            data_ = static_cast<char*>(std::aligned_alloc(64, round_up(bytes, 64)));
            if (data_ == nullptr) throw std::bad_alloc();
            size_ = bytes;
        }
        return data_;
    }

  private:
    char* data_ = nullptr;
    size_t size_ = 0;
};

// Cuts typed arrays from a scratch; the first pass counts bytes, the second hands out addresses.
class Carver {
  public:
    explicit Carver(char* base) : base_(base) {}

    template <typename T>
    T* take(int64_t count) {
        T* address = reinterpret_cast<T*>(base_ + used_);
        used_ += round_up(count * sizeof(T), 64);
        return address;
    }

    size_t used() const { return used_; }

  private:
    char* base_;
    size_t used_ = 0;
};

template <typename Buffers>
Buffers carve(Scratch& scratch, const Call& call, int64_t rows) {
    Carver counter(nullptr);
    Buffers counted(counter, call, rows);
    Carver carver(scratch.reserve(counter.used()));
    return Buffers(carver, call, rows);
}

template <int R, int V>
ALWAYS_INLINE void clear(__m512 (&tile)[R][V]) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) tile[r][v] = _mm512_setzero_ps();
}

template <int R, int V>
ALWAYS_INLINE void load(__m512 (&tile)[R][V], const float* data, int64_t stride) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) tile[r][v] = _mm512_loadu_ps(data + r * stride + v * kLanes);
}

template <int R, int V>
ALWAYS_INLINE void store(const __m512 (&tile)[R][V], float* data, int64_t stride) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) _mm512_storeu_ps(data + r * stride + v * kLanes, tile[r][v]);
}

// tile += A · B. `a` points to pairs: row r of step s stands at a[r * a_row + s * a_step]; `b` steps by b_step pairs.
template <int R, int V>
ALWAYS_INLINE void multiply(
    __m512 (&tile)[R][V], const uint32_t* a, int64_t a_row, int64_t a_step, const uint32_t* b, int64_t b_step, int64_t steps) {
    for (int64_t s = 0; s < steps; ++s) {
        __m512i columns[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) columns[v] = _mm512_loadu_si512(b + s * b_step + v * kLanes);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const __m512i pair = _mm512_set1_epi32(static_cast<int>(a[r * a_row + s * a_step]));
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v)
                tile[r][v] = _mm512_dpbf16_ps(tile[r][v], (__m512bh)pair, (__m512bh)columns[v]);
        }
    }
}

// Calls `body` with the number of rows and of vectors as compile-time constants.
template <int V, typename Body>
ALWAYS_INLINE void with_rows(int64_t rows, Body&& body) {
    switch (rows) {
        case 1: return body.template operator()<1, V>();
        case 2: return body.template operator()<2, V>();
        case 3: return body.template operator()<3, V>();
        case 4: return body.template operator()<4, V>();
        case 5: return body.template operator()<5, V>();
        default: return body.template operator()<6, V>();
    }
}

template <typename Body>
ALWAYS_INLINE void with_shape(int64_t rows, int64_t vectors, Body&& body) {
    switch (vectors) {
        case 1: return with_rows<1>(rows, body);
        case 2: return with_rows<2>(rows, body);
        case 3: return with_rows<3>(rows, body);
        default: return with_rows<4>(rows, body);
    }
}

// 2^x within a relative 2e-7; 0 for minus infinity. 2^x = 2^floor(x) · 2^f with a polynomial on 0 <= f < 1.
ALWAYS_INLINE __m512 exp2_vector(__m512 x) {
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(0.0018671007f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.009017092f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.055799868f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24016446f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6931513f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, x);
}

// Columns [0, visible) as a lane mask of the vector that starts at `column`.
ALWAYS_INLINE __mmask16 lanes_below(int64_t visible, int64_t column) {
    const int64_t lanes = std::clamp<int64_t>(visible - column, 0, kLanes);
    return static_cast<__mmask16>((1u << lanes) - 1u);
}

// 16 x 16 words, transposed in registers.
ALWAYS_INLINE void transpose(__m512i (&rows)[16]) {
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
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// Rows [count, D] as columns, for products over D: [panel of 64 rows][width / 2][64][2]. Rows past `count`, up to a multiple of
// kStep, are zero. D is a multiple of 16.
inline void pack_columns(uint32_t* packed, const bf16* rows, int64_t stride, int64_t count, int64_t size) {
    const int64_t pairs = width_of(size) / 2;
    for (int64_t start = 0; start < round_up(count, kStep); start += kLanes) {
        uint32_t* panel = packed + start / kPanel * pairs * kPanel + start % kPanel;
        for (int64_t pair = 0; pair < pairs; pair += kLanes) {
            const __mmask16 inside = lanes_below(size / 2, pair);
            __m512i words[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                const __mmask16 mask = start + i < count ? inside : static_cast<__mmask16>(0);
                words[i] = _mm512_maskz_loadu_epi32(mask, rows + (start + i) * stride + pair * 2);
            }
            transpose(words);
            const int64_t stored = std::min(kLanes, pairs - pair);
            for (int64_t i = 0; i < stored; ++i) _mm512_storeu_si512(panel + (pair + i) * kPanel, words[i]);
        }
    }
}

// Rows [count, D] for products over the rows: [count / 2][D][2]; an odd last row is paired with zeros, and with AMX there are
// pairs of zeros up to a multiple of kStep rows.
inline void pack_pairs(uint32_t* packed, const bf16* rows, int64_t stride, int64_t count, int64_t size) {
    for (int64_t row = 0; row < count; row += 2) {
        const bf16* first = rows + row * stride;
        const bf16* second = row + 1 < count ? first + stride : nullptr;
        uint32_t* target = packed + row / 2 * size;
        for (int64_t d = 0; d < size; d += kLanes) {
            __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + d)));
            if (second != nullptr) {
                const __m256i other = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + d));
                low = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(other), 16));
            }
            _mm512_storeu_si512(target + d, low);
        }
    }
    if constexpr (kHasAmx) {
        const int64_t pairs = (count + 1) / 2;
        std::memset(packed + pairs * size, 0, (round_up(count, kStep) / 2 - pairs) * size * sizeof(uint32_t));
    }
}

// out[rows, columns] = A · B with A [rows <= kTileRows, width] row by row and B from `pack_columns`; as many columns as a
// multiple of kStep has.
inline void multiply_columns(
    const bf16* a, int64_t rows, const uint32_t* packed, int64_t columns, int64_t size, float* out, int64_t out_stride) {
    if constexpr (kHasAmx) {
        const int64_t pairs = width_of(size) / 2;
        for (int64_t column = 0; column < columns; column += kPanel) {
            const int64_t held = std::min(kPanel, round_up(columns - column, kStep));
            const uint32_t* left = reinterpret_cast<const uint32_t*>(a);
            multiply_block(left, pairs, packed + column * pairs, kPanel, pairs, rows, held, out + column, out_stride, false);
        }
        return;
    }
    for (int64_t column = 0; column < columns; column += kPanel) {
        const int64_t vectors = std::min(kTileVectors, (columns - column + kLanes - 1) / kLanes);
        with_shape(rows, vectors, [&]<int R, int V>() {
            __m512 tile[R][V];
            clear(tile);
            multiply(tile, reinterpret_cast<const uint32_t*>(a), size / 2, 1, packed + column * size / 2, kPanel, size / 2);
            store(tile, out + column, out_stride);
        });
    }
}

// Sets to minus infinity the scores of those keys [start, start + keys) that a row may not see: past its causal limit or the
// end, or not in its mask. `keys` is a multiple of 16.
inline void hide(const Call& call, const Row& place, int64_t visible, float* scores, int64_t start, int64_t keys) {
    if (call.mask == nullptr && visible >= start + keys) return;
    const uint8_t* mask = nullptr;
    if (call.mask != nullptr) mask = call.mask + place.branch * call.mask_strides[0] + place.token * call.mask_strides[1];
    const __m512 hidden = _mm512_set1_ps(-kInfinity);
    for (int64_t key = 0; key < keys; key += kLanes) {
        __mmask16 seen = lanes_below(visible, start + key);
        if (mask != nullptr && seen != 0) {
            const __m128i bytes = _mm_maskz_loadu_epi8(seen, mask + start + key);
            seen = _mm_test_epi8_mask(bytes, bytes);
        }
        if (seen != 0xffff) _mm512_storeu_ps(scores + key, _mm512_mask_mov_ps(hidden, seen, _mm512_loadu_ps(scores + key)));
    }
}
