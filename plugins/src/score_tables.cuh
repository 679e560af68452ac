// The scoring kernel's look-up table in shared memory: what it holds and how it is built (score.cu reads it).
#ifndef SOCKET_TRT_SCORE_TABLES_CUH_
#define SOCKET_TRT_SCORE_TABLES_CUH_

#include "device.cuh"

namespace socket_trt {

constexpr int kGroup = 32;  // hash tables that a stage holds: one a bank of shared memory

// An entry of the look-up table has four bytes: of one code in one hash table, the probabilities of four query heads,
// or two of 16 bits, or one of 23 bits (a KV head's sum, where it selects as one).
enum Packing : int { kFourHeads = 4, kTwoHeads = 2, kOneSum = 1 };

// COLUMNS hash tables are looked up in one pass over the codes: their entries for one code are a row.
template <int CODE_BYTES, int COLUMNS>
struct Layout {
    static constexpr int kCodeBits = CODE_BYTES == 1 ? 8 : 10;
    static constexpr int kRows = 1 << kCodeBits;
    static constexpr int kRowBytes = COLUMNS * 4;
    static constexpr int kTableBytes = kRows * kRowBytes;
    static constexpr int kUnit = 128 / CODE_BYTES;      // tokens that a warp scores at once
    static constexpr int kQuadTokens = kUnit / 8;       // of them, those that four lanes look up together
    static constexpr int kOwnTokens = kQuadTokens / 2;  // and those whose sums end up in a lane
    static constexpr int kProducts = kQuadTokens / 4;   // matrix products a step: each takes four of a lane's tokens
};

// Which query heads of its KV head a block scores.
struct Heads {
    int first, count;
};

// Probabilities of the positive sides of the planes, in shared memory: a hash table for each column, four query heads.
// Planes that are missing at the front count as never positive, so that codes that no key has get entries of zero.
template <int CODE_BYTES, int COLUMNS>
struct Sides {
    static constexpr int kBits = Layout<CODE_BYTES, COLUMNS>::kCodeBits;
    float p[4][kBits][COLUMNS];

    // probability: [heads, planes, tables] of the KV head's first query head.  meanwhile(): what to do while they come.
    template <typename Meanwhile>
    __device__ __forceinline__ void load(const Arguments& a, const float* probability, int first, int count,
                                         int first_table, Meanwhile meanwhile) {
        constexpr int kRows = 4 * kBits, kColumns = COLUMNS / 32;
        constexpr int kAtOnce = 3;  // rows of a warp: all of them, of eight planes, from eleven warps on
        const int rank = a.p.planes_per_table, missing = kBits - rank;
        const int warp = threadIdx.x >> 5, warps = blockDim.x >> 5, lane = threadIdx.x & 31;
        for (int base = warp; base < kRows; base += kAtOnce * warps) {
            float x[kAtOnce][kColumns];
#pragma unroll
            for (int k = 0; k < kAtOnce; k++) {
                const int i = base + k * warps, h = i / kBits, r = i % kBits;
                const float* from = probability + static_cast<int64_t>((first + h) * rank + r - missing) * a.p.tables;
#pragma unroll
                for (int c = 0; c < kColumns; c++) {
                    const int table = first_table + c * 32 + lane;
                    const bool exists = i < kRows && r >= missing && h < count && table < a.p.tables;
                    x[k][c] = exists ? __ldg(from + table) : 0.f;
                }
            }
            if (base == warp) meanwhile();
#pragma unroll
            for (int k = 0; k < kAtOnce; k++) {
                const int i = base + k * warps;
#pragma unroll
                for (int c = 0; c < kColumns; c++) {
                    if (i < kRows) p[i / kBits][i % kBits][c * 32 + lane] = x[k][c];
                }
            }
        }
    }
    __device__ __forceinline__ float side(int h, int r, int column, bool positive) const {
        return positive ? p[h][r][column] : 1.f - p[h][r][column];
    }
    // The likeliest code's probability.
    __device__ __forceinline__ float most(int h, int column) const {
        float product = 1.f;
#pragma unroll
        for (int r = 0; r < kBits; r++) product *= fabsf(p[h][r][column] - 0.5f) + 0.5f;
        return product;
    }
};

// The entry for the products x[h] * y[h] of up to four heads.  Adding 2^23 leaves a number below that, rounded, in the
// low bits of the sum.
template <int PACKING>
__device__ __forceinline__ void store_entry(uint32_t* entry, const float (&x)[4], const float (&y)[4], bool add) {
    constexpr float kRound = 8388608.f;
    const auto rounded = [&](int h) { return __float_as_uint(fmaf(x[h], y[h], kRound)); };
    if constexpr (PACKING == kFourHeads) {
        const uint32_t front = __byte_perm(rounded(0), rounded(1), 0x0040);
        const uint32_t back = __byte_perm(rounded(2), rounded(3), 0x0040);
        *entry = __byte_perm(front, back, 0x5410);
    } else if constexpr (PACKING == kTwoHeads) {
        *entry = __byte_perm(rounded(0), rounded(1), 0x5410);
    } else {
        const float all = fmaf(x[3], y[3], fmaf(x[2], y[2], fmaf(x[1], y[1], x[0] * y[0])));
        const uint32_t sum = __float_as_uint(all + kRound) & 0x7fffff;
        *entry = add ? *entry + sum : sum;
    }
}

// Fill the table for COLUMNS hash tables from `first_table` on.  Every head's likeliest code gets the largest entry
// that fits; a sum's heads share one scale.  meanwhile(): what to do while the planes' sides come; it may be called
// more than once.  All threads must call build_table; it ends with a barrier.
template <int CODE_BYTES, int COLUMNS, int PACKING, typename Meanwhile>
__device__ void build_table(const Arguments& a, const float* probability, Heads heads, int first_table,
                            Sides<CODE_BYTES, COLUMNS>& sides, char* table, Meanwhile meanwhile) {
    using L = Layout<CODE_BYTES, COLUMNS>;
    constexpr int kTop = L::kCodeBits - 5;  // the last five planes are unrolled: three, then two
    // The last a little less than 2^23, since the products' order differs and may round them up.
    constexpr float kLargest = PACKING == kFourHeads ? 255.f : PACKING == kTwoHeads ? 65535.f : 8388600.f;
    __shared__ uint32_t largest[16];
    const int column = threadIdx.x % COLUMNS, slice = threadIdx.x / COLUMNS, slices = blockDim.x / COLUMNS;

    if (threadIdx.x < 16) largest[threadIdx.x] = 0;
    for (int first = 0; first < heads.count; first += 4) {
        if (first > 0) __syncthreads();
        sides.load(a, probability, heads.first + first, heads.count - first, first_table, meanwhile);
        __syncthreads();
        for (int h = slice; h < 4; h += slices) {
            float most = first + h < heads.count && first_table + column < a.p.tables ? sides.most(h, column) : 0.f;
            most = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(most)));  // positive: ordered as integers
            if ((threadIdx.x & 31) == 0) atomicMax(&largest[(first + h) & 15], __float_as_uint(most));
        }
    }
    for (int first = 0; first < heads.count; first += 4) {
        if (heads.count > 4) {
            __syncthreads();
            sides.load(a, probability, heads.first + first, heads.count - first, first_table, [] {});
            __syncthreads();
        }
        float middle[8][4], last[4][4];
#pragma unroll
        for (int h = 0; h < 4; h++) {
#pragma unroll
            for (int c = 0; c < 8; c++) {
                middle[c][h] = sides.side(h, kTop, column, c & 4) * sides.side(h, kTop + 1, column, c & 2) *
                               sides.side(h, kTop + 2, column, c & 1);
            }
#pragma unroll
            for (int c = 0; c < 4; c++) {
                last[c][h] = sides.side(h, kTop + 3, column, c & 2) * sides.side(h, kTop + 4, column, c & 1);
            }
        }
        if (first == 0) __syncthreads();  // the largest are known
        float scale[4], together = 0.f;
        if (PACKING == kOneSum) {
            for (int h = 0; h < heads.count; h++) together += __uint_as_float(largest[h]);
        }
#pragma unroll
        for (int h = 0; h < 4; h++) {
            const bool exists = first + h < heads.count && first_table + column < a.p.tables;
            scale[h] = exists ? kLargest / (PACKING == kOneSum ? together : __uint_as_float(largest[h])) : 0.f;
        }
        for (int top = slice; top < 1 << kTop; top += slices) {
            float front[4];
#pragma unroll
            for (int h = 0; h < 4; h++) {
                front[h] = scale[h];
#pragma unroll
                for (int r = 0; r < kTop; r++) front[h] *= sides.side(h, r, column, top >> (kTop - 1 - r) & 1);
            }
            char* row = table + top * 32 * L::kRowBytes + column * 4;
#pragma unroll
            for (int m = 0; m < 8; m++) {
                float part[4];
#pragma unroll
                for (int h = 0; h < 4; h++) part[h] = front[h] * middle[m][h];
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    store_entry<PACKING>(reinterpret_cast<uint32_t*>(row + (m * 4 + c) * L::kRowBytes), part, last[c],
                                         first > 0);
                }
            }
        }
    }
    __syncthreads();
}

}  // namespace socket_trt

#endif  // SOCKET_TRT_SCORE_TABLES_CUH_
