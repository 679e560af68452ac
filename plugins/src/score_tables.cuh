// Building the look-up tables of the scoring kernel (score.cu) in shared memory.
#ifndef SOCKET_TRT_SCORE_TABLES_CUH_
#define SOCKET_TRT_SCORE_TABLES_CUH_

#include "device.cuh"

namespace socket_trt {

constexpr int kGroup = 32;           // tables that a stage holds, one a bank
constexpr int kRowBytes = 256;       // of the look-up table: one entry of each column
constexpr int kRegionBytes = 65536;  // 256 rows
constexpr int kHalfEntries = 16;     // of a half-table of up to 4 planes

template <int CODE_BYTES, int HEADS>
struct Layout {
    static constexpr int kTokensPerWord = 4 / CODE_BYTES;
    static constexpr int kWords = CODE_BYTES == 1 ? 2 : 1;  // words of each table row that a lane looks after
    static constexpr int kWordTokens = 32 * kTokensPerWord;
    static constexpr int kUnit = kWords * kWordTokens;  // tokens that a warp scores at once
    static constexpr int kWordBytes = kGroup * 128;
    static constexpr int kStageBytes = kWords * kWordBytes;
    static constexpr int kEntryBytes = CODE_BYTES == 1 ? 4 : 2 * HEADS;
    static constexpr int kColumns = kRowBytes / kEntryBytes;
    static constexpr int kGroupsPerRegion = kColumns / kGroup;
    static_assert(kScoreUnit % kUnit == 0, "rows of keys are padded to kScoreUnit");
};

// Which query heads of its KV head a block scores.
struct Heads {
    int first, count;
};

// The 16 products of up to 4 planes: entry c takes p[r] where c has bit r set (the first plane the most significant of
// `planes` bits), 1 - p[r] where not.  Returns the largest.
template <int R = 0>
__device__ __forceinline__ float expand(const float* logit, int planes, float (&product)[kHalfEntries]) {
    if constexpr (R == 0) product[0] = 1.f;
    if constexpr (R < 4) {
        if (R < planes) {
            const float p = 1.f / (1.f + __expf(-logit[R])), q = 1.f - p;
#pragma unroll
            for (int i = 0; i < 1 << R; i++) {
                const int c = (1 << R) - 1 - i;
                product[2 * c + 1] = product[c] * p;
                product[2 * c] = product[c] * q;
            }
            return fmaxf(p, q) * expand<R + 1>(logit, planes, product);
        }
    }
    return 1.f;
}

// Products of all combinations of `planes` <= 8 planes behind `offset`, of up to four heads at a time:
// use(row, column, x[4]) for every row (combination) and column (table), scaled so that a head's largest product is
// `entry_max` (or, with `common`, so that 1 is).  `half` has 2 * 16 * columns entries.
template <typename Use>
__device__ void build_products(const Arguments& a, const float* logit, Heads heads, int columns, int offset, int planes,
                               float entry_max, bool common, float4* half, uint32_t* largest, Use use) {
    const int rank = a.p.planes_per_table, tables = a.p.tables;
    const int after = min(planes, 4), before = planes - after;
    __syncthreads();
    if (threadIdx.x < 4) largest[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < columns * 4; i += blockDim.x) {
        const int table = i >> 2, h = i & 3;
        float front[kHalfEntries] = {}, back[kHalfEntries] = {};
        if (h < heads.count && table < tables) {
            const float* from = logit + (static_cast<int64_t>(heads.first + h) * tables + table) * rank + offset;
            const float most = expand(from, before, front) * expand(from + before, after, back);
            atomicMax(&largest[h], __float_as_uint(most));
        }
        float* to = reinterpret_cast<float*>(half) + i;
#pragma unroll
        for (int c = 0; c < kHalfEntries; c++) {
            if (c < 1 << before) to[c * columns * 4] = front[c];
            if (c < 1 << after) to[(kHalfEntries + c) * columns * 4] = back[c];
        }
    }
    __syncthreads();
    float scale[4];
#pragma unroll
    for (int h = 0; h < 4; h++) {
        scale[h] = common ? entry_max : h < heads.count ? entry_max / __uint_as_float(largest[h]) : 0.f;
    }
    for (int i = threadIdx.x; i < columns << before; i += blockDim.x) {
        const int column = i & (columns - 1), row = i / columns << after;
        const float4 front = half[i];
        const float f[4] = {front.x * scale[0], front.y * scale[1], front.z * scale[2], front.w * scale[3]};
#pragma unroll 4
        for (int c = 0; c < 1 << after; c++) {
            const float4 back = half[(kHalfEntries + c) * columns + column];
            const float x[4] = {f[0] * back.x, f[1] * back.y, f[2] * back.z, f[3] * back.w};
            use(row + c, column, x);
        }
    }
}

// Round a number below 2^23 to an integer: the low bits after adding 2^23, faster than a conversion.
__device__ __forceinline__ uint32_t round_up_to_23_bits(float x) {
    return __float_as_uint(x + 8388608.f);
}

// Build the block's table; `weight[h]` becomes what one unit of head h's sums stands for.
template <int CODE_BYTES, int HEADS>
__device__ void build_tables(const Arguments& a, const float* logit, Heads heads, int regions, char* low, char* high,
                             float4* scratch, float* weight) {
    using L = Layout<CODE_BYTES, HEADS>;
    __shared__ uint32_t largest[2][4];
    const int rank = a.p.planes_per_table, columns = regions * L::kColumns;
    const auto entry_of = [](char* base, int region_rows, int row, int column) {
        return base + column / L::kColumns * region_rows * kRowBytes + row * kRowBytes +
               column % L::kColumns * L::kEntryBytes;
    };
    if constexpr (CODE_BYTES == 2) {
        const auto store = [](char* entry, const float (&x)[4]) {
#pragma unroll
            for (int h = 0; h < HEADS; h++) reinterpret_cast<__half*>(entry)[h] = __float2half_rn(x[h]);
        };
        const int high_rows = 1 << (rank - 8);
        build_products(a, logit, heads, columns, rank - 8, 8, 1.f, false, scratch, largest[0],
                       [&](int row, int column, const float (&x)[4]) { store(entry_of(low, 256, row, column), x); });
        build_products(
            a, logit, heads, columns, 0, rank - 8, 1.f, false, scratch, largest[1],
            [&](int row, int column, const float (&x)[4]) { store(entry_of(high, high_rows, row, column), x); });
        if (threadIdx.x < HEADS) {
            weight[threadIdx.x] = __uint_as_float(largest[0][threadIdx.x]) * __uint_as_float(largest[1][threadIdx.x]);
        }
    } else {
        if (rank < 8) {  // rows that no code names: stale bytes may, and must find zeros
            for (int i = threadIdx.x; i < regions * kRegionBytes / 16; i += blockDim.x) {
                reinterpret_cast<uint4*>(low)[i] = make_uint4(0, 0, 0, 0);
            }
        }
        // The sum of a KV head's query heads takes one scale for all, and as many rounds of four heads as there are.
        constexpr bool kSummed = HEADS == 1;
        const float entry_max = HEADS == 4   ? 127.f
                                : HEADS == 2 ? static_cast<float>(65535 / a.p.tables)
                                             : 8388607.f / heads.count;
        for (int first = 0; first < heads.count; first += 4) {
            const Heads round{heads.first + first, min(4, heads.count - first)};
            build_products(a, logit, round, columns, 0, rank, entry_max, kSummed, scratch, largest[0],
                           [&](int row, int column, const float (&x)[4]) {
                               uint32_t* entry = reinterpret_cast<uint32_t*>(entry_of(low, 256, row, column));
                               if constexpr (HEADS == 4) {
                                   const uint32_t front =
                                       __byte_perm(round_up_to_23_bits(x[0]), round_up_to_23_bits(x[1]), 0x0040);
                                   const uint32_t back =
                                       __byte_perm(round_up_to_23_bits(x[2]), round_up_to_23_bits(x[3]), 0x0040);
                                   *entry = __byte_perm(front, back, 0x5410);
                               } else if constexpr (HEADS == 2) {
                                   *entry = __byte_perm(round_up_to_23_bits(x[0]), round_up_to_23_bits(x[1]), 0x5410);
                               } else {
                                   const uint32_t sum = round_up_to_23_bits(x[0] + x[1] + x[2] + x[3]) & 0x7fffff;
                                   *entry = first == 0 ? sum : *entry + sum;
                               }
                           });
        }
        if (threadIdx.x < HEADS) {
            weight[threadIdx.x] = (kSummed ? 1.f : __uint_as_float(largest[0][threadIdx.x])) / entry_max;
        }
    }
    __syncthreads();
}

}  // namespace socket_trt

#endif  // SOCKET_TRT_SCORE_TABLES_CUH_
