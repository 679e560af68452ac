// The scoring kernel's look-up table in shared memory: what it holds and how it is built (score.cu reads it).
#ifndef SOCKET_TRT_SCORE_TABLES_CUH_
#define SOCKET_TRT_SCORE_TABLES_CUH_

#include "device.cuh"

namespace socket_trt {

constexpr int kGroup = 32;  // hash tables that a stage holds: one a bank of shared memory

// An entry of the look-up table has four bytes: of one code in one hash table, the probabilities of four query heads, or
// two of 16 bits, or one of 23 bits (a KV head's sum, where it selects as one).
enum Packing : int { kFourHeads = 4, kTwoHeads = 2, kOneSum = 1 };

// COLUMNS hash tables are looked up in one pass over the codes: their entries for one code are a row.
template <int CODE_BYTES, int COLUMNS>
struct Layout {
    static constexpr int kCodeBits = CODE_BYTES == 1 ? 8 : 10;
    static constexpr int kRows = 1 << kCodeBits;
    static constexpr int kRowBytes = COLUMNS * 4;
    static constexpr int kTableBytes = kRows * kRowBytes;
    static constexpr int kUnit = 128 / CODE_BYTES;     // tokens that a warp scores at once
    static constexpr int kQuadTokens = kUnit / 8;      // of them, those that four lanes look up together
    static constexpr int kOwnTokens = kQuadTokens / 2;  // and those whose sums end up in a lane
    static constexpr int kProducts = kQuadTokens / 4;  // matrix products a step: each takes four of a lane's tokens
};

// Which query heads of its KV head a block scores.
struct Heads {
    int first, count;
};

// Probabilities of the positive side of a hash table's planes for four query heads.  Planes that are missing at the
// front count as never positive, so that codes that no key has get entries of zero.
template <int BITS>
struct Sides {
    float p[4][BITS];

    // probability: [heads, planes, tables] of the KV head's first query head.
    __device__ __forceinline__ void load(const Arguments& a, const float* probability, int first, int count,
                                         int table) {
        const int rank = a.p.planes_per_table, missing = BITS - rank;
#pragma unroll
        for (int h = 0; h < 4; h++) {
#pragma unroll
            for (int r = 0; r < BITS; r++) {
                const bool exists = r >= missing && h < count && table < a.p.tables;
                const int64_t at = static_cast<int64_t>((first + h) * rank + r - missing) * a.p.tables + table;
                p[h][r] = exists ? __ldg(probability + at) : 0.f;
            }
        }
    }
    __device__ __forceinline__ float side(int h, int r, bool positive) const {
        return positive ? p[h][r] : 1.f - p[h][r];
    }
    // The likeliest code's probability.
    __device__ __forceinline__ float most(int h) const {
        float product = 1.f;
#pragma unroll
        for (int r = 0; r < BITS; r++) product *= fmaxf(p[h][r], 1.f - p[h][r]);
        return product;
    }
};

// Round a number below 2^23 to an integer: the low bits after adding 2^23, faster than a conversion.
__device__ __forceinline__ uint32_t round_to_23_bits(float x) {
    return __float_as_uint(x + 8388608.f);
}

template <int PACKING>
__device__ __forceinline__ void store_entry(uint32_t* entry, const float (&x)[4], bool add) {
    if constexpr (PACKING == kFourHeads) {
        const uint32_t front = __byte_perm(round_to_23_bits(x[0]), round_to_23_bits(x[1]), 0x0040);
        const uint32_t back = __byte_perm(round_to_23_bits(x[2]), round_to_23_bits(x[3]), 0x0040);
        *entry = __byte_perm(front, back, 0x5410);
    } else if constexpr (PACKING == kTwoHeads) {
        *entry = __byte_perm(round_to_23_bits(x[0]), round_to_23_bits(x[1]), 0x5410);
    } else {
        const uint32_t sum = round_to_23_bits(x[0] + x[1] + x[2] + x[3]) & 0x7fffff;
        *entry = add ? *entry + sum : sum;
    }
}

// Fill the table for COLUMNS hash tables from `first_table` on.  Every head's likeliest code gets the largest entry that
// fits; a sum's heads share one scale.  All threads must call it; ends without a barrier.
template <int CODE_BYTES, int COLUMNS, int PACKING>
__device__ void build_table(const Arguments& a, const float* probability, Heads heads, int first_table, char* table) {
    using L = Layout<CODE_BYTES, COLUMNS>;
    constexpr int kBits = L::kCodeBits, kTop = kBits - 5;  // the last five planes are unrolled: three, then two
    // The last a little less than 2^23, since the products' order differs and may round them up.
    constexpr float kLargest = PACKING == kFourHeads ? 255.f : PACKING == kTwoHeads ? 65535.f : 8388600.f;
    __shared__ uint32_t largest[16];
    const int column = threadIdx.x % COLUMNS, slice = threadIdx.x / COLUMNS, slices = blockDim.x / COLUMNS;
    const int hash_table = first_table + column;

    Sides<kBits> sides;
    if (threadIdx.x < 16) largest[threadIdx.x] = 0;
    __syncthreads();
    for (int first = 0; first < heads.count; first += 4) {
        const int count = min(4, heads.count - first);
        sides.load(a, probability, heads.first + first, count, hash_table);
#pragma unroll
        for (int h = 0; h < 4; h++) {
            float most = h < count && hash_table < a.p.tables ? sides.most(h) : 0.f;
#pragma unroll
            for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
            if ((threadIdx.x & 31) == 0 && slice == 0) atomicMax(&largest[(first + h) & 15], __float_as_uint(most));
        }
    }
    __syncthreads();
    float together = 0.f;
    for (int h = 0; h < heads.count; h++) together += __uint_as_float(largest[h]);

    for (int first = 0; first < heads.count; first += 4) {
        if (first > 0 || heads.count > 4) {
            sides.load(a, probability, heads.first + first, min(4, heads.count - first), hash_table);
        }
        float scale[4], middle[4][8], last[4][4];
#pragma unroll
        for (int h = 0; h < 4; h++) {
            const bool exists = first + h < heads.count && hash_table < a.p.tables;
            const float most = PACKING == kOneSum ? together : __uint_as_float(largest[h]);
            scale[h] = exists ? kLargest / most : 0.f;
#pragma unroll
            for (int c = 0; c < 8; c++) {
                middle[h][c] = sides.side(h, kTop, c & 4) * sides.side(h, kTop + 1, c & 2) *
                               sides.side(h, kTop + 2, c & 1);
            }
#pragma unroll
            for (int c = 0; c < 4; c++) {
                last[h][c] = sides.side(h, kTop + 3, c & 2) * sides.side(h, kTop + 4, c & 1);
            }
        }
        for (int top = slice; top < 1 << kTop; top += slices) {
            float front[4];
#pragma unroll
            for (int h = 0; h < 4; h++) {
                front[h] = scale[h];
#pragma unroll
                for (int r = 0; r < kTop; r++) front[h] *= sides.side(h, r, top >> (kTop - 1 - r) & 1);
            }
            char* row = table + top * 32 * L::kRowBytes + column * 4;
#pragma unroll
            for (int m = 0; m < 8; m++) {
                float part[4];
#pragma unroll
                for (int h = 0; h < 4; h++) part[h] = front[h] * middle[h][m];
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    const float x[4] = {part[0] * last[0][c], part[1] * last[1][c], part[2] * last[2][c],
                                        part[3] * last[3][c]};
                    store_entry<PACKING>(reinterpret_cast<uint32_t*>(row + (m * 4 + c) * L::kRowBytes), x, first > 0);
                }
            }
        }
    }
}

}  // namespace socket_trt

#endif  // SOCKET_TRT_SCORE_TABLES_CUH_
