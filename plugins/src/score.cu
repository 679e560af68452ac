// Scores of all candidates of all sparse decode items, as float16 numbers that order them, for up to 10 planes.
//
// A score is a sum of L look-ups, one a hash table, and what bounds it is shared memory.  The table (score_tables.cuh)
// lies so that a hash table is a bank, and the 32 lanes of a warp always look at 32 different hash tables: no two meet,
// whatever the codes.  A look-up fetches four bytes that serve up to four query heads of a KV head.
//
// Tensor cores add them up.  The four lanes of a quad look up the same tokens in different hash tables; as the left
// operand of a matrix product of bytes, a lane's words are four tokens' rows, and a right operand of zeros and ones
// adds the quad's bytes head by head, exactly, in 32 bits.  So a look-up costs little more than its address and its
// load.
//
// Warps work alone.  Each has a ring of stages in shared memory, a stage being the codes of a unit of tokens in 32 hash
// tables, filled by asynchronous copies of 16 bytes whatever the page size.  Rows of a stage are rotated by pieces of
// 16 bytes so that the lanes of a load find their pieces in different banks.
#include <algorithm>

#include "device.cuh"
#include "launchers.h"
#include "mma.cuh"
#include "score_tables.cuh"

namespace socket_trt {
namespace {

constexpr int kMaxWarps = 16;
constexpr int kStages = 2;
constexpr int kStageBytes = kGroup * 128;
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

// What a block scores: an item, and which of the parts that its tokens are split into.
struct Share {
    int item, part, parts;
};

// Every sparse item has one of the `slots` blocks (for each set of heads), and of the others what its length deserves.
// A step's only item has them all, sparse or not.  All lanes of a warp must call it; item < 0: nothing to do.
__device__ Share find_share(const Arguments& a, int slots, int slot) {
    if (a.items == 1) return Share{0, slot, slots};
    const int lane = threadIdx.x & 31;
    const auto read_weight = [&](int i) -> uint32_t {
        if (i >= a.items) return 0;
        const Item item = read_item(a, i);
        return item.mode == kItemSparse ? max(1, Candidates(a, item.length).count() / kScoreUnit) : 0;
    };
    const uint32_t first_weight = read_weight(lane);  // most steps have no more items
    const auto weight_of = [&](int i) { return i < 32 ? first_weight : read_weight(i); };
    uint32_t total = 0, items = 0;
    for (int base = 0; base < a.items; base += 32) {
        const uint32_t weight = weight_of(base + lane);
        total += __reduce_add_sync(~0u, weight);
        items += __popc(__ballot_sync(~0u, weight > 0));
    }
    const uint64_t others = slots - items;
    uint32_t before = 0;
    for (int base = 0; base < a.items; base += 32) {
        const uint32_t weight = weight_of(base + lane);
        const uint32_t parts = weight > 0 ? 1 + static_cast<uint32_t>(others * weight / total) : 0;
        const uint32_t until = before + inclusive_warp_sum(parts);
        const uint32_t mine = __ballot_sync(~0u, until > static_cast<uint32_t>(slot));
        if (mine) {
            const int owner = __ffs(mine) - 1;
            const int owned = __shfl_sync(~0u, parts, owner), end = __shfl_sync(~0u, until, owner);
            return Share{base + owner, slot - (end - owned), owned};
        }
        before = __shfl_sync(~0u, until, 31);
    }
    return Share{-1, 0, 1};
}

// One warp's way through the codes, and the copies that run ahead of it.
template <int CODE_BYTES, int COLUMNS>
class Walk {
    using L = Layout<CODE_BYTES, COLUMNS>;

  public:
    // Units first_unit, first_unit + stride, ... below last_unit, of L::kUnit tokens each from position `begin` on, in
    // `tables` hash tables from `first_table` on.
    __device__ Walk(const Arguments& a, int row, int kv_head, int begin, int first_unit, int last_unit, int stride,
                    int first_table, int tables, const uint32_t (&stage)[kStages], uint64_t cache_policy)
        : a_(a),
          cache_policy_(cache_policy),
          begin_(begin),
          unit_(first_unit),
          last_(last_unit),
          stride_(stride),
          tables_(tables) {
        const int lane = threadIdx.x & 31;
        table_row_ = a.p.page_table + static_cast<int64_t>(row) * a.p.pages_per_sequence;
        const int row_bytes = a.p.page_size * CODE_BYTES;
        step_ = 4 * row_bytes;
        page_bytes_ = static_cast<int64_t>(a.p.kv_heads) * a.p.tables * row_bytes;
        head_ = static_cast<const char*>(a.p.code_cache) +
                static_cast<int64_t>(kv_head * a.p.tables + first_table + (lane >> 3)) * row_bytes;
#pragma unroll
        for (int s = 0; s < kStages; s++) stage_[s] = stage[s] + (lane >> 3) * 128;
        from_ = piece_of(unit_, load_page(unit_, lane & 7));
        next_page_ = load_page(unit_ + stride, lane & 7);
    }

    // Position of one of the eight parts of a unit.
    __device__ __forceinline__ int position(int unit, int part) const {
        return begin_ + unit * L::kUnit + part * L::kQuadTokens;
    }
    // The page that a part of a unit lies in, as the table has it.
    __device__ __forceinline__ int load_page(int unit, int part) const {
        const int at = position(unit, part);
        return unit < last_ && at < a_.max_length ? __ldg(table_row_ + (at >> a_.page_shift)) : 0;
    }

    // Position up to which the next stage holds codes.
    __device__ __forceinline__ int end() const { return position(unit_, 8); }

    // Start to copy the next stage: 32 hash tables of a unit, then the next 32, then the next unit.
    __device__ __forceinline__ void copy() {
        if (unit_ < last_) {
            const int lane = threadIdx.x & 31, rows = tables_ - group_ * kGroup;
            if (rows >= kGroup) {
                copy_rows([](int) { return true; });
            } else {
                copy_rows([&](int i) { return 4 * i + (lane >> 3) < rows; });
            }
            if (rows > kGroup) {
                group_++;
                from_ += kGroup / 4 * step_;
            } else {
                group_ = 0;
                unit_ += stride_;
                from_ = piece_of(unit_, next_page_);
                next_page_ = load_page(unit_ + stride_, lane & 7);
            }
        }
        commit_copies();
        const uint32_t used = stage_[0];
#pragma unroll
        for (int s = 0; s + 1 < kStages; s++) stage_[s] = stage_[s + 1];
        stage_[kStages - 1] = used;
    }

  private:
    // Where this lane's pieces of a unit begin: eight lanes copy a row of 128 bytes, four rows at a time.
    __device__ __forceinline__ const char* piece_of(int unit, int page) const {
        static_assert(16 / CODE_BYTES == L::kQuadTokens, "a piece of 16 bytes is a part of a unit");
        return head_ + valid_page(a_, page) * page_bytes_ +
               (position(unit, threadIdx.x & 7) & (a_.p.page_size - 1)) * CODE_BYTES;
    }
    template <typename Wanted>
    __device__ __forceinline__ void copy_rows(Wanted wanted) const {
        const char* from = from_;
#pragma unroll
        for (int i = 0; i < kGroup / 4; i++) {
            // Rows are turned by two pieces every eight rows.
            const uint32_t to = stage_[0] + i * 512 + ((threadIdx.x + (i & ~1)) & 7) * 16;
            if (wanted(i)) copy_16_bytes(to, from, cache_policy_);
            from += step_;
        }
    }

    const Arguments& a_;
    uint64_t cache_policy_;
    const int* table_row_;
    const char *head_, *from_;
    uint32_t stage_[kStages];  // this lane's rows in the stages, the next to be filled first
    int64_t page_bytes_;
    int step_, begin_, unit_, last_, stride_, tables_;
    int group_ = 0, next_page_;
};

// Add the entries of one stage's codes to the sums of a lane's tokens.  `stage` and `entries` are the lane's own
// places.
template <int CODE_BYTES, int COLUMNS>
__device__ __forceinline__ void look_up(int32_t (&sum)[Layout<CODE_BYTES, COLUMNS>::kProducts][4], uint32_t stage,
                                        uint32_t entries, const uint32_t (&right)[2]) {
    using L = Layout<CODE_BYTES, COLUMNS>;
    const int g = (threadIdx.x & 31) >> 2;
    constexpr uint32_t kCodes = (L::kRows - 1) | (L::kRows - 1) << 16;
#pragma unroll 4
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
                           right);
        }
    }
}

// The norms of a lane's tokens.
template <int TOKENS>
struct Norms {
    uint32_t pair[TOKENS / 2];

    __device__ __forceinline__ void load(const uint16_t* from) {
        if constexpr (TOKENS == 8) {
            const uint4 x = __ldg(reinterpret_cast<const uint4*>(from));
            pair[0] = x.x, pair[1] = x.y, pair[2] = x.z, pair[3] = x.w;
        } else {
            const uint2 x = __ldg(reinterpret_cast<const uint2*>(from));
            pair[0] = x.x, pair[1] = x.y;
        }
    }
    __device__ __forceinline__ float2 get(int i, bool half) const {
        return half ? unpack<__half>(pair[i]) : unpack<__nv_bfloat16>(pair[i]);
    }
};

template <int TOKENS>
__device__ __forceinline__ void store_keys(uint16_t* to, const uint32_t (&key)[TOKENS / 2]) {
    if constexpr (TOKENS == 8) {
        *reinterpret_cast<uint4*>(to) = make_uint4(key[0], key[1], key[2], key[3]);
    } else {
        *reinterpret_cast<uint2*>(to) = make_uint2(key[0], key[1]);
    }
}

template <int CODE_BYTES, int COLUMNS, int PACKING>
__global__ __launch_bounds__(kMaxWarps * 32, 1) void score_kernel(const __grid_constant__ Arguments a,
                                                                  const __grid_constant__ ScorePlan plan) {
    using L = Layout<CODE_BYTES, COLUMNS>;
    extern __shared__ __align__(128) char shared[];
    const int warp = threadIdx.x >> 5, warps = blockDim.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int kv_head = blockIdx.x / plan.head_blocks, head_block = blockIdx.x % plan.head_blocks;

    // What is done before the wait looks at nothing that the append kernel writes: its items are found anew, and codes
    // are copied that this step's tokens are not among.
    const Share share = find_share(a, gridDim.y, blockIdx.y);
    const Item item = share.item < 0 ? Item{} : read_item(a, share.item);
    const Candidates candidates(a, item.length);
    const int begin = candidates.begin();
    int first_unit = 0, last_unit = 0;
    if (item.mode == kItemSparse && candidates.count() > attended_budget(a, item.length)) {  // else all are attended
        const int units = (candidates.last - begin + L::kUnit - 1) / L::kUnit;
        const int each = (units + share.parts - 1) / share.parts;
        first_unit = share.part * each, last_unit = min(units, first_unit + each);
    }
    if (first_unit >= last_unit) {
        wait_for_previous_kernel();  // who waits for this kernel's end relies on that of append, too
        return;
    }
    // Blocks that select may begin where others have scored, if they cannot come to lie in pairs there.
    if (a.select_spread) start_next_kernel();

    // Where things lie.
    const uint32_t base = shared_address(shared);
    if (base < kSystemShared || base > kSystemShared + kStaticShared) __trap();
    const Places<CODE_BYTES, COLUMNS> places{base, warps * kStages};
    const uint32_t table = places.table();
    uint32_t stage[kStages];
#pragma unroll
    for (int s = 0; s < kStages; s++) stage[s] = places.stage(warp * kStages + s);
    const uint32_t right[2] = {g < 4 ? 1u << g * 8 : 0u, g >= 4 ? 1u << (g - 4) * 8 : 0u};

    const uint64_t cache_policy = plan.codes_leave_first ? read_once_policy() : usual_policy();
    const bool by_kv_head = a.select_heads == a.p.kv_heads;
    Heads heads{0, a.group};
    if (PACKING != kOneSum) heads = Heads{head_block * PACKING, min(PACKING, a.group - head_block * PACKING)};
    const int64_t lane_index =
        (static_cast<int64_t>(share.item) * a.p.kv_heads + kv_head) * plan.head_blocks + head_block;
    const float* probability =
        a.probability +
        (static_cast<int64_t>(share.item) * a.p.query_heads + kv_head * a.group) * a.p.planes_per_table * a.p.tables;
    // Of the row g of quads, lane t has the tokens of the first half (t < 2) or the second, and two of four columns.
    const int own_token = g * L::kQuadTokens + (t >> 1) * L::kOwnTokens;
    uint32_t* partial =
        static_cast<uint32_t*>(a.score_partial) + (lane_index * a.key_stride + begin) * 2 + lane * (2 * L::kProducts);

    for (int pass = 0; pass < plan.passes; pass++) {
        const int first_table = pass * COLUMNS, tables = min(COLUMNS, a.p.tables - first_table);
        const bool last_pass = pass == plan.passes - 1;
        Walk<CODE_BYTES, COLUMNS> walk(a, item.row, kv_head, begin, first_unit + warp, last_unit, warps, first_table,
                                       tables, stage, cache_policy);
        // Of the first pass one stage alone, so that what the table is made of does not have to queue behind more.
        const int early = pass > 0 ? kStages : 1;
        int copied = 0;
        while (copied < early && (pass > 0 || walk.end() <= item.length - a.p.tokens)) walk.copy(), copied++;
        if (pass == 0) {
            wait_for_previous_kernel();
        } else {
            __syncthreads();  // all warps are done with the last table
        }
        build_table<CODE_BYTES, COLUMNS, PACKING>(
            a, probability, heads, first_table,
            *reinterpret_cast<Sides<CODE_BYTES, COLUMNS>*>(shared + (places.sides() - base)), shared + (table - base),
            [&] {
                for (; copied < kStages; copied++) walk.copy();
            });

        uint32_t own_stage[kStages];  // this lane's rows, 8 t to 8 t + 7, and in them piece g
#pragma unroll
        for (int s = 0; s < kStages; s++) own_stage[s] = stage[s] + t * 1024 + ((g + 2 * t) & 7) * 16;
        int norm_page = walk.load_page(first_unit + warp, g);
        for (int unit = first_unit + warp; unit < last_unit; unit += warps) {
            const int at = begin + unit * L::kUnit + own_token;
            Norms<L::kOwnTokens> norms;
            const int64_t page_head = static_cast<int64_t>(valid_page(a, norm_page)) * a.p.kv_heads + kv_head;
            norms.load(static_cast<const uint16_t*>(a.p.norm_cache) + (page_head << a.page_shift) +
                       (at & (a.p.page_size - 1)));
            norm_page = walk.load_page(unit + warps, g);
            int32_t sum[L::kProducts][4] = {};
            uint32_t* unit_partial = partial + unit * (2 * L::kUnit);
            if (pass > 0) {
#pragma unroll
                for (int m = 0; m < L::kProducts; m++) {
                    const uint2 x = *reinterpret_cast<const uint2*>(unit_partial + 2 * m);
                    sum[m][0] = x.x & 0xffff, sum[m][1] = x.x >> 16, sum[m][2] = x.y & 0xffff, sum[m][3] = x.y >> 16;
                }
            }
            for (int first = 0; first < tables; first += kGroup) {
                wait_for_copies<kStages - 1>();
                __syncwarp();
                look_up<CODE_BYTES, COLUMNS>(sum, own_stage[0], table + first * 4 + t * 32, right);
                __syncwarp();
                walk.copy();
                const uint32_t used = own_stage[0];
#pragma unroll
                for (int s = 0; s + 1 < kStages; s++) own_stage[s] = own_stage[s + 1];
                own_stage[kStages - 1] = used;
            }
            if (!last_pass) {
#pragma unroll
                for (int m = 0; m < L::kProducts; m++) {
                    *reinterpret_cast<uint2*>(unit_partial + 2 * m) =
                        make_uint2(sum[m][0] | sum[m][1] << 16, sum[m][2] | sum[m][3] << 16);
                }
                continue;
            }
            // Scores only order the tokens of their own head: any scale will do that keeps them inside float16.
            constexpr float kScale = PACKING == kFourHeads ? 0x1p-15f : PACKING == kTwoHeads ? 0x1p-23f : 0x1p-30f;
            const bool half = a.p.dtype == SOCKET_TRT_FLOAT16;
            const __half2 largest = __float2half2_rn(65504.f);
            uint32_t key[2][L::kOwnTokens / 2];
#pragma unroll
            for (int m = 0; m < L::kProducts; m++) {
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
#pragma unroll
            for (int i = 0; i < (PACKING == kFourHeads ? 2 : 1); i++) {
                const int h = PACKING == kFourHeads ? 2 * (t & 1) + i : t & 1;
                if (h >= (PACKING == kOneSum ? 1 : heads.count)) continue;
                const int selecting = by_kv_head ? kv_head : kv_head * a.group + heads.first + h;
                const int64_t row = static_cast<int64_t>(share.item) * a.select_heads + selecting;
                store_keys<L::kOwnTokens>(a.score_key + row * a.key_stride + at, key[i]);
                // The sample: of each kSampleTokens the first of one lane, another in every unit.
                constexpr int kQuads = kSampleTokens / L::kQuadTokens;
                if ((g & (kQuads - 1)) == (unit * 3 & (kQuads - 1)) && t >> 1 == (unit >> 2 & 1)) {
                    a.sample_key[row * (a.key_stride / kSampleTokens) + at / kSampleTokens] =
                        static_cast<uint16_t>(key[i][0]);
                }
            }
        }
    }
}

using ScoreKernel = void (*)(Arguments, ScorePlan);

template <int CODE_BYTES, int COLUMNS>
bool try_plan(const Arguments& a, const Device& device, ScorePlan& plan) {
    for (int warps = kMaxWarps; warps >= 4; warps -= 2) {
        plan.shared_memory = Places<CODE_BYTES, COLUMNS>{kSystemShared, warps * kStages}.end() - kSystemShared;
        if (plan.shared_memory + kStaticShared > device.shared_memory) continue;
        plan.warps = warps;
        plan.columns = COLUMNS;
        plan.passes = (a.p.tables + COLUMNS - 1) / COLUMNS;
        return true;
    }
    return false;
}

template <int CODE_BYTES, int COLUMNS>
ScoreKernel kernel_for(int packing) {
    return packing == kFourHeads  ? score_kernel<CODE_BYTES, COLUMNS, kFourHeads>
           : packing == kTwoHeads ? score_kernel<CODE_BYTES, COLUMNS, kTwoHeads>
                                  : score_kernel<CODE_BYTES, COLUMNS, kOneSum>;
}

}  // namespace

ScorePlan plan_score(const Arguments& a, const Device& device) {
    ScorePlan plan{};
    const bool by_kv_head = a.select_heads == a.p.kv_heads;
    plan.packing = by_kv_head || a.group == 1 ? kOneSum : a.group == 2 ? kTwoHeads : kFourHeads;
    plan.head_blocks = plan.packing == kFourHeads ? (a.group + 3) / 4 : 1;
    const bool fits = a.p.planes_per_table <= 8 ? try_plan<1, 64>(a, device, plan) || try_plan<1, 32>(a, device, plan)
                      : a.p.planes_per_table <= 10 ? try_plan<2, 32>(a, device, plan)
                                                   : false;
    if (!fits) return plan_score_wide(a);
    const int64_t lanes = static_cast<int64_t>(a.items) * a.p.kv_heads * plan.head_blocks;
    const int units = (a.max_length + kScoreUnit - 1) / kScoreUnit;
    // One block fills a multiprocessor.  What it costs to start one, in tokens.
    const double start = 3072.0 * plan.passes;
    const int parts =
        best_parts(lanes, device.multiprocessors, std::min(device.multiprocessors, units), a.max_length, start);
    plan.slots = a.items * parts;
    plan.partial_bytes = plan.passes > 1 ? lanes * a.key_stride * 8 : 0;
    const int64_t code_bytes = static_cast<int64_t>(a.items) * a.p.kv_heads * a.max_length * a.p.tables * a.code_bytes;
    plan.codes_leave_first = code_bytes <= 4 * static_cast<int64_t>(device.cache);
    return plan;
}

cudaError_t launch_score(const Arguments& a, const ScorePlan& plan, cudaStream_t stream) {
    if (plan.columns == 0) return launch_score_wide(a, plan, stream);
    const ScoreKernel kernel = a.code_bytes == 2    ? kernel_for<2, 32>(plan.packing)
                               : plan.columns == 64 ? kernel_for<1, 64>(plan.packing)
                                                    : kernel_for<1, 32>(plan.packing);
    const cudaError_t status = set_up(kernel, plan.shared_memory);
    if (status != cudaSuccess) return status;
    Launch launch(dim3(a.p.kv_heads * plan.head_blocks, plan.slots), dim3(plan.warps * 32), plan.shared_memory, stream);
    return launch.overlapped(a.overlapped)(kernel, a, plan);
}

}  // namespace socket_trt
