// Attention forward: blocks of query rows walk over blocks of keys with a running maximum and sum (online softmax).
//
// A block of keys and values is packed once per block of query rows, into memory of the thread that fits its L2 cache. Every row
// meets the keys in the same order whatever the number of threads, so results do not depend on it.

#include <cmath>

#include "tiles.h"

namespace {

constexpr int64_t kKeyBlock = 256;
constexpr int64_t kMostRows = 768;

struct Buffers {
    uint32_t* keys;     // columns of keys, one block
    uint32_t* values;   // pairs of values, one block
    bf16* queries;      // [rows, width]
    float* sums;        // [rows, D], outputs before their division
    float* most;        // [rows], largest score seen
    float* weights;     // [rows], sum of exponentials
    float* scores;      // [tile rows, key block]
    bf16* shares;       // [tile rows, key block]
    Row* places;        // [rows]

    Buffers(Carver& carver, const Call& call, int64_t rows)
        : keys(carver.take<uint32_t>(kKeyBlock * width_of(call.size) / 2)),
          values(carver.take<uint32_t>(kKeyBlock / 2 * call.size)),
          queries(carver.take<bf16>(rows * width_of(call.size))), sums(carver.take<float>(rows * call.size)),
          most(carver.take<float>(rows)), weights(carver.take<float>(rows)), scores(carver.take<float>(kTileRows * kKeyBlock)),
          shares(carver.take<bf16>(kTileRows * kKeyBlock)), places(carver.take<Row>(rows)) {}
};

// Turns the scores of `rows` <= 16 rows, of the tile those from `tile_row` on, into shares in bf16 and updates the rows' maxima
// and sums; `factors` are for what was summed before.
void compute_shares(
    const Buffers& buffers, int64_t first, int64_t tile_row, int64_t rows, int64_t keys, float scale, float* factors) {
    const __mmask16 lanes = lanes_below(rows, 0);
    float largest[kLanes];
    for (int64_t r = 0; r < rows; ++r) {
        const float* scores = buffers.scores + (tile_row + r) * kKeyBlock;
        __m512 vector = _mm512_set1_ps(buffers.most[first + r]);
        for (int64_t key = 0; key < keys; key += kLanes) vector = _mm512_max_ps(vector, _mm512_loadu_ps(scores + key));
        largest[r] = _mm512_reduce_max_ps(vector);
    }
    const __m512 before = _mm512_maskz_loadu_ps(lanes, buffers.most + first), most = _mm512_maskz_loadu_ps(lanes, largest);
    const __m512 scales = _mm512_set1_ps(scale);
    // Where nothing has been seen yet the shift is 0, so that exp2(-inf - 0) = 0.
    const __mmask16 seen = _mm512_cmp_ps_mask(most, _mm512_set1_ps(-kInfinity), _CMP_NEQ_UQ);
    const __m512 shift = _mm512_maskz_mul_ps(seen, most, scales);
    float shifts[kLanes];
    _mm512_storeu_ps(shifts, shift);
    _mm512_storeu_ps(factors, exp2_vector(_mm512_fmsub_ps(before, scales, shift)));
    for (int64_t r = 0; r < rows; ++r) {
        const float* scores = buffers.scores + (tile_row + r) * kKeyBlock;
        bf16* shares = buffers.shares + (tile_row + r) * kKeyBlock;
        __m512 total = _mm512_setzero_ps();
        for (int64_t key = 0; key < keys; key += kLanes) {
            const __m512 share = exp2_vector(_mm512_fmsub_ps(_mm512_loadu_ps(scores + key), scales, _mm512_set1_ps(shifts[r])));
            total = _mm512_add_ps(total, share);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(shares + key), (__m256i)_mm512_cvtneps_pbh(share));
        }
        buffers.weights[first + r] = buffers.weights[first + r] * factors[r] + _mm512_reduce_add_ps(total);
        buffers.most[first + r] = largest[r];
    }
}

// Adds shares · values to the sums of `rows` <= kTileRows rows, whose earlier sums are scaled by `factors`.
void add_values(
    const Buffers& buffers, int64_t first, int64_t rows, int64_t keys, int64_t size, const float* factors, bool is_first) {
    const uint32_t* shares = reinterpret_cast<const uint32_t*>(buffers.shares);
    if constexpr (kHasAmx) {
        float* sums = buffers.sums + first * size;
        for (int64_t r = 0; r < rows && !is_first; ++r)
            for (int64_t d = 0; d < size; d += kLanes) {
                float* place = sums + r * size + d;
                _mm512_storeu_ps(place, _mm512_mul_ps(_mm512_loadu_ps(place), _mm512_set1_ps(factors[r])));
            }
        const int64_t steps = round_up(keys, kStep) / 2;
        multiply_block(shares, kKeyBlock / 2, buffers.values, size, steps, rows, size, sums, size, !is_first);
        return;
    }
    for (int64_t d = 0; d < size; d += kPanel) {
        const int64_t vectors = std::min(kTileVectors, (size - d) / kLanes);
        with_shape(rows, vectors, [&]<int R, int V>() {
            __m512 tile[R][V];
            float* sums = buffers.sums + first * size + d;
            if (is_first) {
                clear(tile);
            } else {
                load(tile, sums, size);
#pragma GCC unroll 6
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                    for (int v = 0; v < V; ++v) tile[r][v] = _mm512_mul_ps(tile[r][v], _mm512_set1_ps(factors[r]));
            }
            multiply(tile, shares, kKeyBlock / 2, 1, buffers.values + d, size, (keys + 1) / 2);
            store(tile, sums, size);
        });
    }
}

// The rows of a tile meet one block of keys.
void attend_tile(const Call& call, const Rows& all, const Buffers& buffers, int64_t first, int64_t rows, int64_t key_start) {
    const Row* places = buffers.places + first;
    const int64_t keys = std::min(kKeyBlock, all.most_visible(places[0], places[rows - 1]) - key_start);
    if (keys <= 0) return;
    const float scale = static_cast<float>(call.scaling) * kLog2E;
    const int64_t padded = round_up(keys, kStep);
    const bf16* queries = buffers.queries + first * width_of(call.size);
    multiply_columns(queries, rows, buffers.keys, keys, call.size, buffers.scores, kKeyBlock);
    for (int64_t r = 0; r < rows; ++r)
        hide(call, places[r], all.visible(places[r]), buffers.scores + r * kKeyBlock, key_start, padded);
    float factors[round_up(kTileRows, kLanes)];
    for (int64_t r = 0; r < rows; r += kLanes)
        compute_shares(buffers, first + r, r, std::min(kLanes, rows - r), padded, scale, factors + r);
    add_values(buffers, first, rows, keys, call.size, factors, key_start == 0);
}

void write_row(const Call& call, const Rows& all, const Buffers& buffers, int64_t r) {
    const float weight = buffers.weights[r];
    // A sum of zero means that nothing was visible; one that is not a number must stay so.
    const bool is_blind = weight == 0.0f;
    const __m512 inverse = _mm512_set1_ps(1.0f / weight);
    bf16* target = at(call.output, call.output_strides, buffers.places[r]);
    for (int64_t d = 0; d < call.size; d += kLanes) {
        const __m512 sums = _mm512_loadu_ps(buffers.sums + r * call.size + d);
        const __m256bh rounded = _mm512_cvtneps_pbh(is_blind ? _mm512_setzero_ps() : _mm512_mul_ps(sums, inverse));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + d), (__m256i)rounded);
    }
    call.lse[all.lse_index(buffers.places[r])] =
        is_blind ? -kInfinity : static_cast<float>(buffers.most[r] * call.scaling + std::log(weight));
}

// Rows [start, stop) of a key-value head.
void attend_rows(const Call& call, const Rows& all, const Buffers& buffers, int64_t start, int64_t stop) {
    const int64_t count = stop - start;
    all.list(start, stop, buffers.places);
    for (int64_t r = 0; r < count; ++r) {
        const bf16* query = at(call.query, call.query_strides, buffers.places[r]);
        copy_row(buffers.queries + r * width_of(call.size), query, call.size);
        buffers.most[r] = -kInfinity;
        buffers.weights[r] = 0.0f;
    }
    const Row shared{all.key_branch, all.shared_head, 0};
    const bf16* key = at(call.key, call.key_strides, shared);
    const bf16* value = at(call.value, call.value_strides, shared);
    const int64_t visible = all.most_visible(buffers.places[0], buffers.places[count - 1]);
    for (int64_t key_start = 0; key_start < visible; key_start += kKeyBlock) {
        const int64_t keys = std::min(kKeyBlock, visible - key_start);
        pack_columns(buffers.keys, key + key_start * call.key_strides[2], call.key_strides[2], keys, call.size);
        pack_pairs(buffers.values, value + key_start * call.value_strides[2], call.value_strides[2], keys, call.size);
        for (int64_t first = 0; first < count; first += kTileRows)
            attend_tile(call, all, buffers, first, std::min(kTileRows, count - first), key_start);
    }
    for (int64_t r = 0; r < count; ++r) write_row(call, all, buffers, r);
}

}  // namespace

// Whether this library was compiled for AMX.
extern "C" int64_t uses_amx() { return kHasAmx; }

// Returns 0, or 1 where memory ran out.
extern "C" int64_t attention_forward(const Call* given) {
    const Call& call = *given;
    const int64_t pairs = call.key_branches * call.shared_heads;
    const int64_t count = Rows(call, 0, 0).count;
    if (count == 0) return 0;
    int64_t rows = std::min(kMostRows, round_up(count, kTileRows));
    // Enough blocks for the threads to share evenly.
    while (rows >= 16 * kTileRows && pairs * ((count + rows - 1) / rows) < 4 * call.threads) rows = round_up(rows / 2, kTileRows);
    const int64_t blocks = (count + rows - 1) / rows;
    int64_t failures = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(call.threads) reduction(+ : failures)
    for (int64_t item = 0; item < blocks * pairs; ++item) {
        static thread_local Scratch scratch;
        const TileRegisters registers;
        try {
            const Buffers buffers = carve<Buffers>(scratch, call, rows);
            const int64_t block = blocks - 1 - item / pairs;  // Under a causal mask the last blocks are the longest: first.
            const Rows all(call, item % pairs / call.shared_heads, item % call.shared_heads);
            attend_rows(call, all, buffers, block * rows, std::min(count, (block + 1) * rows));
        } catch (const std::bad_alloc&) {
            failures += 1;
        }
    }
    return failures > 0;
}
