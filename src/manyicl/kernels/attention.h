// What a call of the kernels is told, and how rows of queries are counted. See cpu_attention.py for the contract.
//
// Letters as in attention.py: B branches, H heads, K key-value heads, L query tokens, T keys, D head size; group = H / K.
// Keys and values have either the B branches of the queries or one branch that all of them share.

#pragma once

#include <algorithm>
#include <cstdint>

using bf16 = uint16_t;

extern "C" {

// Mirrored field by field by the ctypes structure `_Call` in cpu_attention.py; every field takes eight bytes.
struct Call {
    const bf16* query;
    const bf16* key;
    const bf16* value;
    const uint8_t* mask;  // bool [B, L, T] or null
    bf16* output;
    float* lse;  // [B, H, L], contiguous
    const bf16* output_gradient;
    float* delta;            // [B, H, L], contiguous: sums of output · output_gradient
    float* query_partial;    // fp32 [splits, branches of keys, K, rows of a key-value head, D]
    bf16* query_gradient;
    bf16* key_gradient;
    bf16* value_gradient;
    int64_t branches, heads, shared_heads, length, total, size, key_branches;
    int64_t query_strides[3];  // Strides count elements of branch, head and token; the last dimension is contiguous.
    int64_t key_strides[3];
    int64_t value_strides[3];
    int64_t output_strides[3];
    int64_t output_gradient_strides[3];
    int64_t query_gradient_strides[3];
    int64_t key_gradient_strides[3];
    int64_t value_gradient_strides[3];
    int64_t mask_strides[2];  // branch, token
    double scaling;
    int64_t is_causal;
    int64_t splits;  // parts into which the keys of a key-value head are divided in the backward pass
    int64_t threads;
};

}  // extern "C"

// One query row of a key-value head.
struct Row {
    int64_t branch, head, token;
};

// The rows of one (branch of keys, key-value head): every query token of every head of the group, and of every branch where
// the keys are shared. Heads change fastest, so that neighbouring rows see about the same keys under a causal mask.
struct Rows {
    const Call& call;
    int64_t key_branch, shared_head, group, count;

    Rows(const Call& call, int64_t key_branch, int64_t shared_head)
        : call(call), key_branch(key_branch), shared_head(shared_head), group(call.heads / call.shared_heads),
          count(group * call.length * (call.branches / call.key_branches)) {}

    Row at(int64_t row) const {
        const int64_t token = row / group;
        const int64_t branch = call.key_branches == 1 ? token / call.length : key_branch;
        return {branch, shared_head * group + row % group, token % call.length};
    }

    // Rows [start, stop) one after the other: divisions for the first only.
    void list(int64_t start, int64_t stop, Row* places) const {
        Row place = at(start);
        for (int64_t row = start; row < stop; ++row) {
            *places++ = place;
            if (++place.head < (shared_head + 1) * group) continue;
            place.head -= group;
            if (++place.token < call.length) continue;
            place.token = 0;
            ++place.branch;
        }
    }

    // How many keys, from the first, a row may see before its mask is looked at.
    int64_t visible(const Row& row) const {
        if (!call.is_causal) return call.total;
        return std::clamp<int64_t>(row.token + call.total - call.length + 1, 0, call.total);
    }

    // The most that any of the rows from `first` to `last` sees; where a branch ends between them, its last token sees all.
    int64_t most_visible(const Row& first, const Row& last) const {
        return first.branch == last.branch ? visible(last) : call.total;
    }

    int64_t lse_index(const Row& row) const { return (row.branch * call.heads + row.head) * call.length + row.token; }
};

inline const bf16* at(const bf16* data, const int64_t (&strides)[3], const Row& row) {
    return data + row.branch * strides[0] + row.head * strides[1] + row.token * strides[2];
}

inline bf16* at(bf16* data, const int64_t (&strides)[3], const Row& row) {
    return data + row.branch * strides[0] + row.head * strides[1] + row.token * strides[2];
}
