// Attention backward: for each block of keys all query rows that see it are walked through once.
//
//     P = exp(S - lse)    dV += P^T dO    dP = dO V^T    dS = P (dP - delta)    dK += dS^T Q · scaling    dQ += dS K · scaling
//
// The keys of a key-value head are divided into `splits` parts, so that threads share them; a part sums its own dQ in fp32, and
// the parts are added in order at the end. Nothing depends on which thread does what.
//
// With AMX dK and dV are summed as their transposes, dK^T += Q^T dS: so P and dS are right operands as they stand, and only Q
// and dO, which are smaller, are turned.

#include "tiles.h"

namespace {

constexpr int64_t kKeyBlock = 192;
constexpr int64_t kRowBlock = 96;
constexpr int64_t kStrip = 48;  // keys of one strip of pairs: [strip][rows / 2][48][2]

struct Buffers {
    uint32_t* key_columns;
    uint32_t* value_columns;
    uint32_t* key_pairs;
    float* key_sums;            // dK [key block, D], with AMX [D, key block]
    float* value_sums;          // dV, likewise
    float* turned_sums;         // with AMX both as [key block, D]
    bf16* queries;              // [row block, width]
    bf16* gradients;            // dO [row block, width]
    uint32_t* query_pairs;      // [row block / 2, D], with AMX [D, row block / 2]
    uint32_t* gradient_pairs;   // likewise
    uint32_t* pairs;            // those of either before they are turned
    float* shifts;              // [row block], log-sum-exp in units of log 2
    float* deltas;              // [row block]
    float* scores;              // [tile rows, key block]
    float* share_gradients;     // dP [tile rows, key block]
    float* query_sums;          // dQ of a last tile with fewer rows [tile rows, D]
    uint32_t* share_strips;     // P, pairs of rows
    uint32_t* score_strips;     // dS, pairs of rows
    bf16* score_rows;           // dS [row block, key block]
    Row* places;                // [row block]

    Buffers(Carver& carver, const Call& call, int64_t)
        : key_columns(carver.take<uint32_t>(kKeyBlock * width_of(call.size) / 2)),
          value_columns(carver.take<uint32_t>(kKeyBlock * width_of(call.size) / 2)),
          key_pairs(carver.take<uint32_t>(kKeyBlock * call.size / 2)), key_sums(carver.take<float>(kKeyBlock * call.size)),
          value_sums(carver.take<float>(kKeyBlock * call.size)),
          turned_sums(carver.take<float>(kHasAmx ? 2 * kKeyBlock * call.size : 0)),
          queries(carver.take<bf16>(kRowBlock * width_of(call.size))),
          gradients(carver.take<bf16>(kRowBlock * width_of(call.size))),
          query_pairs(carver.take<uint32_t>(kRowBlock * call.size / 2)),
          gradient_pairs(carver.take<uint32_t>(kRowBlock * call.size / 2)),
          pairs(carver.take<uint32_t>(kRowBlock * call.size / 2)), shifts(carver.take<float>(kRowBlock)),
          deltas(carver.take<float>(kRowBlock)), scores(carver.take<float>(kTileRows * kKeyBlock)),
          share_gradients(carver.take<float>(kTileRows * kKeyBlock)),
          query_sums(carver.take<float>(kTileRows * call.size)),
          share_strips(carver.take<uint32_t>(kRowBlock / 2 * kKeyBlock)),
          score_strips(carver.take<uint32_t>(kRowBlock / 2 * kKeyBlock)), score_rows(carver.take<bf16>(kRowBlock * kKeyBlock)),
          places(carver.take<Row>(kRowBlock)) {}
};

// One block of keys of one key-value head, and the rows that now meet it.
struct Block {
    const Call& call;
    const Rows& all;
    const Buffers& buffers;
    int64_t key_start, keys;
    int64_t row_start, rows;

    // Keys of the block that some of the rows [first, last] see.
    int64_t visible(int64_t first, int64_t last) const {
        return std::clamp<int64_t>(all.most_visible(buffers.places[first], buffers.places[last]) - key_start, 0, keys);
    }

    // Keys of the block that some of the tile's rows, from `first` on, see.
    int64_t visible(int64_t first) const { return visible(first, std::min(first + kTileRows, rows) - 1); }
};

// Where the pair of rows [row, row + 1] keeps the vector of keys that starts at `key`.
uint32_t* in_strips(uint32_t* strips, int64_t row, int64_t key) {
    return strips + key / kStrip * (kRowBlock / 2 * kStrip) + row / 2 * kStrip + key % kStrip;
}

Rows rows_of(const Call& call, int64_t pair) { return Rows(call, pair / call.shared_heads, pair % call.shared_heads); }

// [rows, columns] of 32-bit words, both multiples of 16, as [columns, rows].
void turn(uint32_t* target, int64_t target_row, const uint32_t* source, int64_t source_row, int64_t rows, int64_t columns) {
    for (int64_t row = 0; row < rows; row += kLanes)
        for (int64_t column = 0; column < columns; column += kLanes) {
            __m512i words[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) words[i] = _mm512_loadu_si512(source + (row + i) * source_row + column);
            transpose(words);
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) _mm512_storeu_si512(target + (column + i) * target_row + row, words[i]);
        }
}

// Rows as pairs of rows, turned with AMX.
void pair_rows(const Block& block, uint32_t* target, const bf16* rows) {
    const int64_t size = block.call.size;
    pack_pairs(kHasAmx ? block.buffers.pairs : target, rows, width_of(size), block.rows, size);
    if constexpr (kHasAmx) turn(target, kRowBlock / 2, block.buffers.pairs, size, round_up(block.rows, kStep) / 2, size);
}

void load_rows(const Block& block) {
    const Call& call = block.call;
    const Buffers& buffers = block.buffers;
    for (int64_t r = 0; r < block.rows; ++r) {
        const Row& place = buffers.places[r];
        const int64_t width = width_of(call.size);
        copy_row(buffers.queries + r * width, at(call.query, call.query_strides, place), call.size);
        copy_row(buffers.gradients + r * width, at(call.output_gradient, call.output_gradient_strides, place), call.size);
        const int64_t index = block.all.lse_index(place);
        // A row that sees nothing has no shares: exp2(-inf - 0) = 0.
        buffers.shifts[r] = call.lse[index] == -kInfinity ? 0.0f : call.lse[index] * kLog2E;
        buffers.deltas[r] = call.delta[index];
    }
    pair_rows(block, buffers.query_pairs, buffers.queries);
    pair_rows(block, buffers.gradient_pairs, buffers.gradients);
}

// 16 bf16 of a first row (low half) and of a second, interleaved to pairs.
ALWAYS_INLINE __m512i interleave(__m512i rows) {
    const __m512i order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, rows);
}

// No P and no dS for the rows [row, row + 1] at the keys of the block from `start` on.
void clear_pair(const Block& block, int64_t row, int64_t start) {
    for (int64_t key = start; key < block.keys; key += kLanes) {
        _mm512_storeu_si512(in_strips(block.buffers.share_strips, row, key), _mm512_setzero_si512());
        _mm512_storeu_si512(in_strips(block.buffers.score_strips, row, key), _mm512_setzero_si512());
    }
}

// P and dS of the rows [row, row + 1], whose scores and dP are the rows [r, r + 1] of the tile. Without a second row its place is
// filled with zeros.
void differentiate_pair(const Block& block, int64_t row, int64_t r, int64_t keys, bool has_second) {
    const Buffers& buffers = block.buffers;
    const __m512 scale = _mm512_set1_ps(static_cast<float>(block.call.scaling) * kLog2E);
    const int64_t other = has_second ? 1 : 0;
    const __m512 shift0 = _mm512_set1_ps(-buffers.shifts[row]), shift1 = _mm512_set1_ps(-buffers.shifts[row + other]);
    const __m512 delta0 = _mm512_set1_ps(buffers.deltas[row]), delta1 = _mm512_set1_ps(buffers.deltas[row + other]);
    const float* scores = buffers.scores + r * kKeyBlock;
    const float* gradients = buffers.share_gradients + r * kKeyBlock;
    const __mmask16 second = has_second ? 0xffff : 0;
    bf16* target = buffers.score_rows + row * kKeyBlock;
    for (int64_t key = 0; key < keys; key += kLanes) {
        const __m512 share0 = exp2_vector(_mm512_fmadd_ps(_mm512_loadu_ps(scores + key), scale, shift0));
        const __m512 share1 = _mm512_maskz_mov_ps(
            second, exp2_vector(_mm512_fmadd_ps(_mm512_loadu_ps(scores + other * kKeyBlock + key), scale, shift1)));
        const __m512 change0 = _mm512_mul_ps(share0, _mm512_sub_ps(_mm512_loadu_ps(gradients + key), delta0));
        const __m512 change1 = _mm512_maskz_mul_ps(
            second, share1, _mm512_sub_ps(_mm512_loadu_ps(gradients + other * kKeyBlock + key), delta1));
        const __m512i shares = (__m512i)_mm512_cvtne2ps_pbh(share1, share0);
        const __m512i changes = (__m512i)_mm512_cvtne2ps_pbh(change1, change0);
        _mm512_storeu_si512(in_strips(buffers.share_strips, row, key), interleave(shares));
        _mm512_storeu_si512(in_strips(buffers.score_strips, row, key), interleave(changes));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + key), _mm512_castsi512_si256(changes));
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(target + other * kKeyBlock + key),
            has_second ? _mm512_extracti64x4_epi64(changes, 1) : _mm512_castsi512_si256(changes));
    }
    clear_pair(block, row, keys);
}

// dQ of the rows of a tile: `sums` [rows, D] += dS K.
void add_queries(const Block& block, int64_t first, int64_t rows, int64_t keys, float* sums) {
    const Buffers& buffers = block.buffers;
    const int64_t size = block.call.size;
    const uint32_t* changes = reinterpret_cast<const uint32_t*>(buffers.score_rows + first * kKeyBlock);
    if constexpr (kHasAmx) {
        const bool is_whole = rows % kLanes == 0;  // The unit works on 16 rows, and more than these are not ours to write.
        float* target = is_whole ? sums : buffers.query_sums;
        if (!is_whole) std::memcpy(target, sums, rows * size * sizeof(float));
        const int64_t steps = round_up(keys, kStep) / 2;
        multiply_block(changes, kKeyBlock / 2, buffers.key_pairs, size, steps, rows, size, target, size, true);
        if (!is_whole) std::memcpy(sums, target, rows * size * sizeof(float));
        return;
    }
    for (int64_t d = 0; d < size; d += kPanel) {
        with_shape(rows, std::min(kTileVectors, (size - d) / kLanes), [&]<int R, int V>() {
            __m512 tile[R][V];
            load(tile, sums + d, size);
            multiply(tile, changes, kKeyBlock / 2, 1, buffers.key_pairs + d, size, (keys + 1) / 2);
            store(tile, sums + d, size);
        });
    }
}

// P, dS and with them dQ of the tile's rows, from `first` on; `query_sums` [rows, D] are those of the block.
void differentiate_tile(const Block& block, int64_t first, float* query_sums) {
    const Call& call = block.call;
    const Buffers& buffers = block.buffers;
    const int64_t rows = std::min(kTileRows, block.rows - first), size = call.size, width = width_of(size);
    const Row* places = buffers.places + first;
    const int64_t keys = block.visible(first), padded = round_up(keys, kStep);
    if (keys > 0) {
        multiply_columns(buffers.queries + first * width, rows, buffers.key_columns, keys, size, buffers.scores, kKeyBlock);
        multiply_columns(
            buffers.gradients + first * width, rows, buffers.value_columns, keys, size, buffers.share_gradients, kKeyBlock);
        for (int64_t r = 0; r < rows; ++r)
            hide(call, places[r], block.all.visible(places[r]), buffers.scores + r * kKeyBlock, block.key_start, padded);
    }
    for (int64_t r = 0; r < rows; r += 2) differentiate_pair(block, first + r, r, padded, r + 1 < rows);
    if constexpr (kHasAmx)
        for (int64_t r = round_up(rows, 2); r < kTileRows; r += 2) clear_pair(block, first + r, 0);
    if (keys > 0) add_queries(block, first, rows, keys, query_sums + first * size);
}

// sums [keys, D] += strips^T · pairs, or with AMX the transpose of that, over the rows of the block from the first that sees a
// key.
void add_transposed(const Block& block, float* sums, uint32_t* strips, const uint32_t* pairs) {
    const int64_t size = block.call.size;
    int64_t first = 0;
    for (int64_t key = 0; key < block.keys; key += kHasAmx ? kStrip : kVectorRows) {
        while (first < block.rows && block.visible(first) <= key) first += kTileRows;
        if (first >= block.rows) return;
        if constexpr (kHasAmx) {
            const int64_t columns = std::min(kStrip, round_up(block.keys - key, kLanes));
            const int64_t steps = round_up(block.rows - first, kStep) / 2;
            const uint32_t* strip = in_strips(strips, first, key);
            multiply_block(pairs + first / 2, kRowBlock / 2, strip, kStrip, steps, size, columns, sums + key, kKeyBlock, true);
            continue;
        }
        const int64_t keys = std::min(kVectorRows, block.keys - key), steps = (block.rows - first + 1) / 2;
        for (int64_t d = 0; d < size; d += kPanel) {
            with_shape(keys, std::min(kTileVectors, (size - d) / kLanes), [&]<int R, int V>() {
                __m512 tile[R][V];
                load(tile, sums + key * size + d, size);
                multiply(tile, in_strips(strips, first, key), 1, kStrip, pairs + first / 2 * size + d, size, steps);
                store(tile, sums + key * size + d, size);
            });
        }
    }
}

ALWAYS_INLINE __m512 widen(const bf16* data) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

void write_rounded(bf16* target, const float* sums, int64_t size, float factor) {
    for (int64_t d = 0; d < size; d += kLanes) {
        const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(sums + d), _mm512_set1_ps(factor));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + d), (__m256i)_mm512_cvtneps_pbh(scaled));
    }
}

// Sums [D, key block] as [key block, D].
void turn_sums(float* target, const float* sums, int64_t size) {
    turn(reinterpret_cast<uint32_t*>(target), size, reinterpret_cast<const uint32_t*>(sums), kKeyBlock, size, kKeyBlock);
}

// One block of keys: its dK and dV are written, its part of dQ is added to `query_sums` [rows of the head, D].
void differentiate_keys(const Call& call, const Rows& all, const Buffers& buffers, int64_t key_start, float* query_sums) {
    Block block{call, all, buffers, key_start, std::min(kKeyBlock, call.total - key_start), 0, 0};
    const Row shared{all.key_branch, all.shared_head, key_start};
    const bf16* key = at(call.key, call.key_strides, shared);
    const bf16* value = at(call.value, call.value_strides, shared);
    pack_columns(buffers.key_columns, key, call.key_strides[2], block.keys, call.size);
    pack_columns(buffers.value_columns, value, call.value_strides[2], block.keys, call.size);
    pack_pairs(buffers.key_pairs, key, call.key_strides[2], block.keys, call.size);
    std::memset(buffers.key_sums, 0, kKeyBlock * call.size * sizeof(float));
    std::memset(buffers.value_sums, 0, kKeyBlock * call.size * sizeof(float));
    for (block.row_start = 0; block.row_start < all.count; block.row_start += kRowBlock) {
        block.rows = std::min(kRowBlock, all.count - block.row_start);
        all.list(block.row_start, block.row_start + block.rows, buffers.places);
        if (block.visible(0, block.rows - 1) == 0) continue;
        load_rows(block);
        for (int64_t first = 0; first < block.rows; first += kTileRows)
            differentiate_tile(block, first, query_sums + block.row_start * call.size);
        add_transposed(block, buffers.value_sums, buffers.share_strips, buffers.gradient_pairs);
        add_transposed(block, buffers.key_sums, buffers.score_strips, buffers.query_pairs);
    }
    float* key_sums = buffers.key_sums;
    float* value_sums = buffers.value_sums;
    if constexpr (kHasAmx) {
        key_sums = buffers.turned_sums;
        value_sums = key_sums + kKeyBlock * call.size;
        turn_sums(key_sums, buffers.key_sums, call.size);
        turn_sums(value_sums, buffers.value_sums, call.size);
    }
    for (int64_t k = 0; k < block.keys; ++k) {
        const Row place{all.key_branch, all.shared_head, key_start + k};
        bf16* key_target = at(call.key_gradient, call.key_gradient_strides, place);
        bf16* value_target = at(call.value_gradient, call.value_gradient_strides, place);
        write_rounded(key_target, key_sums + k * call.size, call.size, static_cast<float>(call.scaling));
        write_rounded(value_target, value_sums + k * call.size, call.size, 1.0f);
    }
}

// delta of one row: the sum of output · dO, which is what normalising takes from every dP.
void write_delta(const Call& call, const Rows& all, int64_t row) {
    const Row place = all.at(row);
    const bf16* output = at(call.output, call.output_strides, place);
    const bf16* gradient = at(call.output_gradient, call.output_gradient_strides, place);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < call.size; d += kLanes) sum = _mm512_fmadd_ps(widen(output + d), widen(gradient + d), sum);
    call.delta[all.lse_index(place)] = _mm512_reduce_add_ps(sum);
}

// dQ of one row: the parts added in order, scaled and rounded.
void write_query_gradient(const Call& call, const Rows& all, int64_t pair, int64_t pairs, int64_t row) {
    bf16* target = at(call.query_gradient, call.query_gradient_strides, all.at(row));
    for (int64_t d = 0; d < call.size; d += kLanes) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t split = 0; split < call.splits; ++split) {
            const float* part = call.query_partial + ((split * pairs + pair) * all.count + row) * call.size;
            sum = _mm512_add_ps(sum, _mm512_loadu_ps(part + d));
        }
        sum = _mm512_mul_ps(sum, _mm512_set1_ps(static_cast<float>(call.scaling)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + d), (__m256i)_mm512_cvtneps_pbh(sum));
    }
}

}  // namespace

// Returns 0, or 1 where memory ran out.
extern "C" int64_t attention_backward(const Call* given) {
    const Call& call = *given;
    const int64_t pairs = call.key_branches * call.shared_heads;
    const int64_t count = Rows(call, 0, 0).count;
    const int64_t blocks = (call.total + kKeyBlock - 1) / kKeyBlock;
#pragma omp parallel for schedule(static) num_threads(call.threads)
    for (int64_t index = 0; index < pairs * count; ++index) write_delta(call, rows_of(call, index / count), index % count);
    int64_t failures = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(call.threads) reduction(+ : failures)
    for (int64_t item = 0; item < pairs * call.splits; ++item) {
        static thread_local Scratch scratch;
        const TileRegisters registers;
        try {
            const Buffers buffers = carve<Buffers>(scratch, call, 0);
            const int64_t split = item / pairs;
            const Rows all = rows_of(call, item % pairs);
            float* query_sums = call.query_partial + item * count * call.size;
            std::memset(query_sums, 0, count * call.size * sizeof(float));
            for (int64_t block = 0; block < blocks; ++block) {
                // There and back again, so that every part gets early and late blocks: 0 1 2 2 1 0 0 1 2 ...
                const int64_t turn = block % (2 * call.splits);
                if (std::min(turn, 2 * call.splits - 1 - turn) == split)
                    differentiate_keys(call, all, buffers, block * kKeyBlock, query_sums);
            }
        } catch (const std::bad_alloc&) {
            failures += 1;
        }
    }
#pragma omp parallel for schedule(static) num_threads(call.threads)
    for (int64_t index = 0; index < pairs * count; ++index)
        write_query_gradient(call, rows_of(call, index / count), index / count, pairs, index % count);
    return failures > 0;
}
