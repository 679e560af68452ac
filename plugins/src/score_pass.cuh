// How a warp goes through the codes of a KV head and adds up scores: shared memory, asynchronous copies, look-ups, and
// keys that order the tokens.  score.cu says why it is done this way.
#ifndef SOCKET_TRT_SCORE_PASS_CUH_
#define SOCKET_TRT_SCORE_PASS_CUH_

#include "async_copy.cuh"
#include "device.cuh"
#include "mma.cuh"
#include "score_tables.cuh"

namespace socket_trt {

constexpr int kStages = 2;  // of a warp's ring
constexpr int kStageBytes = kGroup * 128;
constexpr int kSystemShared = 1024;  // where a block's own shared memory begins
constexpr int kStaticShared = 1024;  // at most
// With 64 columns the table lies on a multiple of its size, so that one byte permutation makes an entry's address.
constexpr int kAlignedTable = 65536;
constexpr int kStagesBelowTable = (kAlignedTable - kSystemShared - kStaticShared) / kStageBytes;

// Where table, stages and the planes' sides lie in dynamic shared memory, which begins at address `base`.
template <int CODE_BYTES, int COLUMNS>
struct Places {
    static constexpr bool kAligned = COLUMNS == 64;
    static constexpr int kTableBytes = Layout<CODE_BYTES, COLUMNS>::kTableBytes;
    uint32_t base;
    int stages;

    __host__ __device__ uint32_t table() const { return kAligned ? kAlignedTable : base + stages * kStageBytes; }
    __host__ __device__ uint32_t stage(int i) const {
        const bool above = kAligned && i >= kStagesBelowTable;
        return above ? kAlignedTable + kTableBytes + (i - kStagesBelowTable) * kStageBytes : base + i * kStageBytes;
    }
    __host__ __device__ uint32_t sides() const {
        const int above = kAligned && stages > kStagesBelowTable ? stages - kStagesBelowTable : 0;
        return table() + kTableBytes + above * kStageBytes;
    }
    __host__ __device__ uint32_t end() const { return sides() + sizeof(Sides<CODE_BYTES, COLUMNS>); }
};

__device__ __forceinline__ uint32_t load_word(uint32_t address) {
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address));
    return x;
}
__device__ __forceinline__ uint4 load_piece(uint32_t address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address));
    return x;
}

// A KV head's codes in memory, of which a warp copies 32 hash tables at a time into a stage: eight lanes copy a row of
// 128 bytes, each a piece of 16 bytes, and the warp four rows at a time.
template <int CODE_BYTES, int COLUMNS>
class CodeRows {
    using L = Layout<CODE_BYTES, COLUMNS>;
    static_assert(16 / CODE_BYTES == L::kQuadTokens, "a piece of 16 bytes is a part of a unit");

  public:
    __device__ CodeRows(const Arguments& a, int row, int kv_head, int first_table) : a_(a) {
        table_row_ = a.p.page_table + static_cast<int64_t>(row) * a.p.pages_per_sequence;
        const int row_bytes = a.p.page_size * CODE_BYTES;
        step_ = 4 * row_bytes;
        page_bytes_ = static_cast<int64_t>(a.p.kv_heads) * a.p.tables * row_bytes;
        head_ = static_cast<const char*>(a.p.code_cache) +
                static_cast<int64_t>(kv_head * a.p.tables + first_table + ((threadIdx.x & 31) >> 3)) * row_bytes;
    }

    // The page that a position lies in, as the table has it.
    __device__ __forceinline__ int load_page(int position) const {
        return position < a_.max_length ? __ldg(table_row_ + (position >> a_.page_shift)) : 0;
    }
    __device__ __forceinline__ uint32_t checked(int page) const {
        return static_cast<uint32_t>(page) < static_cast<uint32_t>(a_.p.pages) ? page : 0;
    }
    // Where this lane's pieces of the tokens from `position` on begin.
    __device__ __forceinline__ const char* piece(int position, int page) const {
        return head_ + checked(page) * page_bytes_ + (position & (a_.p.page_size - 1)) * CODE_BYTES;
    }
    // The same pieces, 32 hash tables further.
    __device__ __forceinline__ const char* next_group(const char* from) const { return from + kGroup / 4 * step_; }
    // This lane's rows in a stage.
    __device__ __forceinline__ static uint32_t lane_rows(uint32_t stage) {
        return stage + ((threadIdx.x & 31) >> 3) * 128;
    }
    // Start to copy up to 32 rows to this lane's rows `to` of a stage.
    __device__ __forceinline__ void copy(uint32_t to, const char* from, int rows) const {
        if (rows >= kGroup) {
            copy_where(to, from, [](int) { return true; });
        } else {
            copy_where(to, from, [&](int i) { return 4 * i + static_cast<int>((threadIdx.x & 31) >> 3) < rows; });
        }
    }

  private:
    template <typename Wanted>
    __device__ __forceinline__ void copy_where(uint32_t to, const char* from, Wanted wanted) const {
#pragma unroll
        for (int i = 0; i < kGroup / 4; i++) {
            // Rows are turned by two pieces every eight rows.
            if (wanted(i)) copy_16_bytes(to + i * 512 + ((threadIdx.x + (i & ~1)) & 7) * 16, from);
            from += step_;
        }
    }

    const Arguments& a_;
    const int* table_row_;
    const char* head_;
    int64_t page_bytes_;
    int step_;
};

// One warp's way through the codes, and the copies that run ahead of it.
template <int CODE_BYTES, int COLUMNS>
class Walk {
    using L = Layout<CODE_BYTES, COLUMNS>;

  public:
    // Units first_unit, first_unit + stride, ... below last_unit, of L::kUnit tokens each from position `begin` on, in
    // `tables` hash tables from `first_table` on.
    __device__ Walk(const Arguments& a, int row, int kv_head, int begin, int first_unit, int last_unit, int stride,
                    int first_table, int tables, const uint32_t (&stage)[kStages])
        : rows_(a, row, kv_head, first_table), begin_(begin), last_(last_unit), stride_(stride), tables_(tables) {
#pragma unroll
        for (int s = 0; s < kStages; s++) stage_[s] = rows_.lane_rows(stage[s]);
        restart(first_unit);
    }

    // Begin at `unit`, once all copies up to the end have been made.
    __device__ __forceinline__ void restart(int unit) {
        unit_ = unit;
        group_ = 0;
        from_ = piece_of(unit, load_page(unit, threadIdx.x & 7));
        next_page_ = load_page(unit + stride_, threadIdx.x & 7);
    }

    // Position of one of the eight parts of a unit.
    __device__ __forceinline__ int position(int unit, int part) const {
        return begin_ + unit * L::kUnit + part * L::kQuadTokens;
    }
    // The page that a part of a unit lies in, as the table has it.
    __device__ __forceinline__ int load_page(int unit, int part) const {
        return unit < last_ ? rows_.load_page(position(unit, part)) : 0;
    }
    __device__ __forceinline__ uint32_t checked(int page) const { return rows_.checked(page); }
    __device__ __forceinline__ const CodeRows<CODE_BYTES, COLUMNS>& rows() const { return rows_; }

    // Position up to which the next stage holds codes.
    __device__ __forceinline__ int end() const { return position(unit_, 8); }

    // Start to copy the next stage: 32 hash tables of a unit, then the next 32, then the next unit.
    __device__ __forceinline__ void copy() {
        if (unit_ < last_) {
            const int rows = tables_ - group_ * kGroup;
            rows_.copy(stage_[0], from_, rows);
            if (rows > kGroup) {
                group_++;
                from_ = rows_.next_group(from_);
            } else {
                group_ = 0;
                unit_ += stride_;
                from_ = piece_of(unit_, next_page_);
                next_page_ = load_page(unit_ + stride_, threadIdx.x & 7);
            }
        }
        commit_copies();
        const uint32_t used = stage_[0];
#pragma unroll
        for (int s = 0; s + 1 < kStages; s++) stage_[s] = stage_[s + 1];
        stage_[kStages - 1] = used;
    }

  private:
    __device__ __forceinline__ const char* piece_of(int unit, int page) const {
        return rows_.piece(position(unit, threadIdx.x & 7), page);
    }

    CodeRows<CODE_BYTES, COLUMNS> rows_;
    const char* from_;
    uint32_t stage_[kStages];  // this lane's rows in the stages, the next to be filled first
    int begin_, unit_, last_, stride_, tables_;
    int group_, next_page_;
};

// Of a stage, the rows that a lane looks at, 8 t to 8 t + 7, and in them piece g.
__device__ __forceinline__ uint32_t lane_stage(uint32_t stage) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    return stage + t * 1024 + ((g + 2 * t) & 7) * 16;
}
// The table's entries that a lane looks at.
__device__ __forceinline__ uint32_t lane_entries(uint32_t table) {
    return table + (threadIdx.x & 3) * 32;
}
// Of a unit's tokens, the first whose sum ends up in this lane: of the row g of quads, lane t has the tokens of the
// first half (t < 2) or the second, and two of four columns.
template <int CODE_BYTES, int COLUMNS>
__device__ __forceinline__ int lane_token() {
    using L = Layout<CODE_BYTES, COLUMNS>;
    const int lane = threadIdx.x & 31;
    return (lane >> 2) * L::kQuadTokens + ((lane & 3) >> 1) * L::kOwnTokens;
}

// The right operand that adds up a quad's entries byte by byte: this lane's part of it.
struct QuadSum {
    uint32_t right[2];

    __device__ __forceinline__ QuadSum() {
        const int g = (threadIdx.x & 31) >> 2;
        right[0] = g < 4 ? 1u << g * 8 : 0u;
        right[1] = g >= 4 ? 1u << (g - 4) * 8 : 0u;
    }
};

// Add the entries of one stage's codes to the sums of a lane's tokens.  `stage` and `entries` are the lane's own
// places.
template <int CODE_BYTES, int COLUMNS>
__device__ __forceinline__ void look_up(int32_t (&sum)[Layout<CODE_BYTES, COLUMNS>::kProducts][4], uint32_t stage,
                                        uint32_t entries, const QuadSum& quad) {
    using L = Layout<CODE_BYTES, COLUMNS>;
    const int g = (threadIdx.x & 31) >> 2;
    constexpr uint32_t kCodes = (L::kRows - 1) | (L::kRows - 1) << 16;
#pragma unroll 2
    for (int s = 0; s < 8; s++) {
        const uint32_t row = (g + s) & 7;
        const uint4 piece = load_piece(stage + row * 128);
        const uint32_t word[4] = {piece.x, piece.y, piece.z, piece.w};
        const uint32_t column = entries + row * 4;
        const auto entry = [&](int token) {
            if constexpr (COLUMNS == 64) {  // byte 0: column; byte 1: code; bytes 2 and 3: the table's place
                return load_word(__byte_perm(word[token / 4], column, 0x7604 | (token & 3) << 4));
            } else if constexpr (CODE_BYTES == 1) {
                return load_word(column + (word[token / 4] >> (token & 3) * 8 & 0xff) * L::kRowBytes);
            } else {
                return load_word(column + ((word[token / 2] & kCodes) >> (token & 1) * 16 & 0xffff) * L::kRowBytes);
            }
        };
#pragma unroll
        for (int m = 0; m < L::kProducts; m++) {
            constexpr int kHalf = L::kOwnTokens;
            multiply_bytes(sum[m], {entry(2 * m), entry(2 * m + 1), entry(kHalf + 2 * m), entry(kHalf + 2 * m + 1)},
                           quad.right);
        }
    }
}

// Add the entries of the walk's next unit: `stage` and `entries` are the lane's own places, the oldest stage first.
template <int CODE_BYTES, int COLUMNS>
__device__ __forceinline__ void look_up_unit(int32_t (&sum)[Layout<CODE_BYTES, COLUMNS>::kProducts][4],
                                             Walk<CODE_BYTES, COLUMNS>& walk, uint32_t (&stage)[kStages],
                                             uint32_t entries, int tables, const QuadSum& quad) {
    for (int first = 0; first < tables; first += kGroup) {
        wait_for_copies<kStages - 1>();
        __syncwarp();
        look_up<CODE_BYTES, COLUMNS>(sum, stage[0], entries + first * 4, quad);
        __syncwarp();
        walk.copy();
        const uint32_t used = stage[0];
#pragma unroll
        for (int s = 0; s + 1 < kStages; s++) stage[s] = stage[s + 1];
        stage[kStages - 1] = used;
    }
}

// The norms of a lane's tokens.
template <int TOKENS>
struct Norms {
    uint32_t pair[TOKENS / 2];

    // Of the tokens from `position` on, in page `page`.
    __device__ __forceinline__ void load(const Arguments& a, uint32_t page, int kv_head, int position) {
        const int64_t page_head = static_cast<int64_t>(page) * a.p.kv_heads + kv_head;
        const uint16_t* from = static_cast<const uint16_t*>(a.p.norm_cache) + (page_head << a.page_shift) +
                               (position & (a.p.page_size - 1));
        if constexpr (TOKENS == 8) {
            const uint4 x = __ldg(reinterpret_cast<const uint4*>(from));
            pair[0] = x.x, pair[1] = x.y, pair[2] = x.z, pair[3] = x.w;
        } else {
            const uint2 x = __ldg(reinterpret_cast<const uint2*>(from));
            pair[0] = x.x, pair[1] = x.y;
        }
    }
    __device__ __forceinline__ float2 get(int i, bool half) const {
        if (half) return __half22float2(*reinterpret_cast<const __half2*>(&pair[i]));
        return make_float2(__uint_as_float(pair[i] << 16), __uint_as_float(pair[i] & 0xffff0000u));
    }
};

// Heads that a lane has keys of, and the i-th of them among those that the table holds.
template <int PACKING>
struct LaneHeads {
    static constexpr int kCount = PACKING == kFourHeads ? 2 : 1;

    __device__ __forceinline__ static int head(int i) {
        return PACKING == kFourHeads ? 2 * (threadIdx.x & 1) + i : threadIdx.x & 1;
    }
    // False where another lane has the same keys, or there is no such head.
    __device__ __forceinline__ static bool exists(int i, int heads) {
        return head(i) < (PACKING == kOneSum ? 1 : heads);
    }
};

// The keys of a lane's tokens for its heads, from the sums of table entries: float16 numbers, two in a word.
template <int CODE_BYTES, int COLUMNS, int PACKING>
__device__ __forceinline__ void make_keys(
    uint32_t (&key)[LaneHeads<PACKING>::kCount][Layout<CODE_BYTES, COLUMNS>::kOwnTokens / 2],
    const int32_t (&sum)[Layout<CODE_BYTES, COLUMNS>::kProducts][4],
    const Norms<Layout<CODE_BYTES, COLUMNS>::kOwnTokens>& norms, bool half) {
    // Scores only order the tokens of their own head: any scale will do that keeps them inside float16.
    constexpr float kScale = PACKING == kFourHeads ? 0x1p-15f : PACKING == kTwoHeads ? 0x1p-23f : 0x1p-30f;
    const __half2 largest = __float2half2_rn(65504.f);
#pragma unroll
    for (int m = 0; m < Layout<CODE_BYTES, COLUMNS>::kProducts; m++) {
        float2 norm = norms.get(m, half);
        norm.x *= kScale, norm.y *= kScale;
        const auto pack = [&](float first, float second) {
            // Selection compares keys as numbers: none is negative, infinite or NaN, whatever the norm.
            const __half2 product = __floats2half2_rn(first * norm.x, second * norm.y);
            const __half2 x = __hmax2(__hmin2(product, largest), __float2half2_rn(0.f));
            return *reinterpret_cast<const uint32_t*>(&x);
        };
        if constexpr (PACKING == kFourHeads) {
            key[0][m] = pack(static_cast<float>(sum[m][0]), static_cast<float>(sum[m][2]));
            key[1][m] = pack(static_cast<float>(sum[m][1]), static_cast<float>(sum[m][3]));
        } else if constexpr (PACKING == kTwoHeads) {
            key[0][m] = pack(static_cast<float>(sum[m][0] + (sum[m][1] << 8)),
                             static_cast<float>(sum[m][2] + (sum[m][3] << 8)));
        } else {
            const int32_t first = sum[m][0] + (sum[m][1] << 8), second = sum[m][2] + (sum[m][3] << 8);
            const int32_t first_high = __shfl_xor_sync(~0u, first, 1);
            const int32_t second_high = __shfl_xor_sync(~0u, second, 1);
            key[0][m] = pack(static_cast<float>(first) + 65536.f * static_cast<float>(first_high),
                             static_cast<float>(second) + 65536.f * static_cast<float>(second_high));
        }
    }
}

}  // namespace socket_trt

#endif  // SOCKET_TRT_SCORE_PASS_CUH_
