// Scores of all cached tokens for all sparse decode items, as 16-bit keys, and a histogram of a sample of the keys.
//
// A score is a sum of L look-ups, and look-ups in shared memory are what bounds it: 32 lanes that look at random places
// of one table meet in a bank three to four deep.  Here lane i of a warp looks at table (i + s) mod 32 in step s, and
// the tables lie one to a bank (row = code, column = table), so that the 32 look-ups of a step never meet.  The row is
// 256 bytes, so that one byte permutation makes the whole address: byte 0 is the column, byte 1 the code.
//
//   up to 8 planes   one look-up a table.  The 4-byte entry serves several query heads of a KV head: four 8-bit
//                    probabilities, or two of 16 bits, or one of 32 (a KV head's sum, where it selects as one).
//   9 to 16 planes   the table is the product of two half-tables (low byte and high byte of the code) in float16; one
//                    entry holds four, two or one heads.
//
// Warps work alone: each copies stages (32 tables of a unit of tokens) into its own piece of shared memory, with
// asynchronous copies of 16 bytes whatever the page size, and looks them up while the other warps wait for theirs.
#include <type_traits>

#include "device.cuh"
#include "launchers.h"
#include "score_tables.cuh"

namespace socket_trt {
namespace {

constexpr int kMaxWarps = 16;
constexpr uint32_t kFixedKey = 65535;  // attended whatever its score

struct SharedPlan {
    int regions, low_bytes, high_bytes, stage_bytes, histogram_bytes, scratch_bytes, total;

    template <int CODE_BYTES, int HEADS>
    __host__ __device__ static SharedPlan make(const Arguments& a, int warps, int histograms) {
        using L = Layout<CODE_BYTES, HEADS>;
        SharedPlan s;
        s.regions = (a.p.tables + L::kColumns - 1) / L::kColumns;
        s.low_bytes = s.regions * kRegionBytes;
        s.high_bytes = CODE_BYTES == 1 ? 0 : s.regions * (1 << (a.p.planes_per_table - 8)) * kRowBytes;
        s.stage_bytes = warps * L::kStageBytes;
        s.histogram_bytes = histograms * kHistogramBins * 2;
        s.scratch_bytes = 2 * kHalfEntries * s.regions * L::kColumns * 16;  // in the place of stages and histogram
        const int used = s.stage_bytes + s.histogram_bytes;
        s.total = s.low_bytes + s.high_bytes + (used > s.scratch_bytes ? used : s.scratch_bytes);
        return s;
    }
};

__device__ __forceinline__ void copy_16_bytes(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}
__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
}

__device__ __forceinline__ uint32_t load_word(uint32_t address) {
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address));
    return x;
}

// Order-preserving 16-bit key of a score: 6 bits of exponent and 10 of mantissa, 1 ... 65534.
__device__ __forceinline__ uint32_t score_key(float score) {
    constexpr int kLowestExponent = 127 - 40;
    return clamp((__float_as_int(score) >> 13) - (kLowestExponent << 10), 1, 65534);
}

// Sums of one lane's tokens over the tables of a stage.
template <int CODE_BYTES, int HEADS>
class Sums;

// Four heads in four bytes of at most 127, so that two entries add up inside their bytes.  Bytes 0 and 2 of such a pair
// add up masked; of pair >> 8 everything adds up, and what bytes 2 brought into it is taken out at the end.
template <>
class Sums<1, 4> {
  public:
    __device__ __forceinline__ void add(int token, uint32_t x, uint32_t y) {
        const uint32_t pair = x + y;
        even_[token] += pair & 0x00ff00ffu;
        odd_[token] += pair >> 8;
    }
    __device__ __forceinline__ float head(int token, int h) const {
        const uint32_t e = even_[token], o = odd_[token] - (e >> 16 << 8);
        const uint32_t pair = h & 1 ? o : e;
        return static_cast<float>(h & 2 ? pair >> 16 : pair & 0xffff);
    }

  private:
    uint32_t even_[Layout<1, 4>::kTokensPerWord] = {}, odd_[Layout<1, 4>::kTokensPerWord] = {};
};

template <int HEADS>
class Sums<1, HEADS> {
  public:
    __device__ __forceinline__ void add(int token, uint32_t x, uint32_t y) { sum_[token] += x + y; }
    __device__ __forceinline__ float head(int token, int h) const {
        if (HEADS == 1) return static_cast<float>(sum_[token]);
        return static_cast<float>(h ? sum_[token] >> 16 : sum_[token] & 0xffff);
    }

  private:
    uint32_t sum_[Layout<1, HEADS>::kTokensPerWord] = {};
};

// Products of half-tables, in float16 over four tables and in float32 over all.
template <int HEADS>
class Sums<2, HEADS> {
  public:
    static constexpr int kPairs = (HEADS + 1) / 2;
    __device__ __forceinline__ void add(int token, uint32_t low, uint32_t high) {
        if constexpr (HEADS == 1) {
            uint16_t x, y;
            asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(low));
            asm volatile("ld.shared.u16 %0, [%1];" : "=h"(y) : "r"(high));
            part_[token][0] = __hfma2(as_pair(x), as_pair(y), part_[token][0]);
        } else if constexpr (HEADS == 2) {
            const uint32_t x = load_word(low), y = load_word(high);
            part_[token][0] = __hfma2(as_pair(x), as_pair(y), part_[token][0]);
        } else {
            uint2 x, y;
            asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(low));
            asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(y.x), "=r"(y.y) : "r"(high));
            part_[token][0] = __hfma2(as_pair(x.x), as_pair(y.x), part_[token][0]);
            part_[token][1] = __hfma2(as_pair(x.y), as_pair(y.y), part_[token][1]);
        }
    }
    __device__ __forceinline__ void widen() {
#pragma unroll
        for (int t = 0; t < Layout<2, HEADS>::kTokensPerWord; t++) {
#pragma unroll
            for (int i = 0; i < kPairs; i++) {
                const float2 x = __half22float2(part_[t][i]);
                sum_[t][2 * i] += x.x;
                sum_[t][2 * i + 1] += x.y;
                part_[t][i] = __half2half2(__ushort_as_half(0));
            }
        }
    }
    __device__ __forceinline__ float head(int token, int h) const { return sum_[token][h]; }

  private:
    static __device__ __forceinline__ __half2 as_pair(uint32_t x) { return *reinterpret_cast<__half2*>(&x); }
    __half2 part_[Layout<2, HEADS>::kTokensPerWord][kPairs] = {};
    float sum_[Layout<2, HEADS>::kTokensPerWord][2 * kPairs] = {};
};

// Look up the tables of one stage for the lane's tokens.
template <int CODE_BYTES, int HEADS>
__device__ __forceinline__ void look_up(Sums<CODE_BYTES, HEADS> (&sums)[Layout<CODE_BYTES, HEADS>::kWords],
                                        uint32_t stage, uint32_t low, uint32_t high, int group, int planes) {
    using L = Layout<CODE_BYTES, HEADS>;
    const int lane = threadIdx.x & 31;
    const uint32_t region = group / L::kGroupsPerRegion;
    const uint32_t column = (group % L::kGroupsPerRegion * kGroup) * L::kEntryBytes | region << 16;
    const uint32_t own = stage + lane * 4;
    if constexpr (CODE_BYTES == 1) {
#pragma unroll 4
        for (int s = 0; s < kGroup; s += 2) {
            const uint32_t row = (lane + s) & (kGroup - 1), next_row = (lane + s + 1) & (kGroup - 1);
            const uint32_t base = column + row * L::kEntryBytes, next_base = column + next_row * L::kEntryBytes;
#pragma unroll
            for (int w = 0; w < L::kWords; w++) {
                const uint32_t codes = load_word(own + row * 128 + w * L::kWordBytes);
                const uint32_t next_codes = load_word(own + next_row * 128 + w * L::kWordBytes);
#pragma unroll
                for (int b = 0; b < 4; b++) {
                    // Byte 0: column; byte 1: code; bytes 2 and 3: region.
                    const uint32_t x = load_word(low + __byte_perm(codes, base, 0x7604 | b << 4));
                    const uint32_t y = load_word(low + __byte_perm(next_codes, next_base, 0x7604 | b << 4));
                    sums[w].add(b, x, y);
                }
            }
        }
    } else {
        // The high byte's row holds the region above its 2^(R-8) codes.
        const uint32_t mask = (1u << planes) - 1, mark = region << planes;
        const uint32_t masks = mask | mask << 16, marks = mark | mark << 16;
#pragma unroll 2
        for (int s = 0; s < kGroup; s += 4) {
#pragma unroll
            for (int t = 0; t < 4; t++) {
                const uint32_t row = (lane + s + t) & (kGroup - 1);
                const uint32_t base = column + row * L::kEntryBytes, base_high = base & 0xff;
                const uint32_t codes = (load_word(own + row * 128) & masks) | marks;
#pragma unroll
                for (int b = 0; b < 2; b++) {
                    sums[0].add(b, low + __byte_perm(codes, base, 0x7604 | b << 5),
                                high + __byte_perm(codes, base_high, 0x7614 | b << 5));
                }
            }
            sums[0].widen();
        }
    }
}

// One warp's way through the cache: which pieces it copies, unit by unit.
template <typename T, int CODE_BYTES, int HEADS>
class Walk {
    using L = Layout<CODE_BYTES, HEADS>;

  public:
    static constexpr int kPieceTokens = 16 / CODE_BYTES;
    using Norms = typename std::conditional<CODE_BYTES == 1, uint2, uint32_t>::type;

    __device__ Walk(const Arguments& a, const Item& item, int head, int begin)
        : a_(a), item_(item), head_(head), begin_(begin) {}

    __device__ __forceinline__ int position(int unit, int word) const {
        return begin_ + unit * L::kUnit + word * L::kWordTokens;
    }

    // The pages from which this lane copies pieces of a unit (eight lanes copy a row of 128 bytes), as the table has
    // them: `check` looks at them when they are needed.
    __device__ __forceinline__ void load_pages(int unit, int (&page)[L::kWords]) const {
        const int* row = a_.p.page_table + static_cast<int64_t>(item_.row) * a_.p.pages_per_sequence;
#pragma unroll
        for (int w = 0; w < L::kWords; w++) {
            const int at = position(unit, w) + (threadIdx.x & 7) * kPieceTokens;
            page[w] = at < a_.max_length ? __ldg(row + (at >> a_.page_shift)) : 0;
        }
    }
    __device__ __forceinline__ void check(int (&page)[L::kWords]) const {
#pragma unroll
        for (int w = 0; w < L::kWords; w++) {
            if (static_cast<uint32_t>(page[w]) >= static_cast<uint32_t>(a_.p.pages)) page[w] = 0;
        }
    }
    // Start to copy a stage: the codes of `group` for a unit's tokens.
    __device__ __forceinline__ void copy(int unit, int group, const int (&page)[L::kWords], uint32_t stage) const {
        const int lane = threadIdx.x & 31, piece = lane & 7;
        const int row_bytes = a_.p.page_size * CODE_BYTES, table = group * kGroup + (lane >> 3);
#pragma unroll
        for (int w = 0; w < L::kWords; w++) {
            const int place = (position(unit, w) + piece * kPieceTokens) & (a_.p.page_size - 1);
            const int64_t page_head = static_cast<int64_t>(page[w]) * a_.p.kv_heads + head_;
            const char* from = static_cast<const char*>(a_.p.code_cache) +
                               (page_head * a_.p.tables + table) * row_bytes + place * CODE_BYTES;
            const uint32_t to = stage + w * L::kWordBytes + (lane >> 3) * 128 + piece * 16;
#pragma unroll
            for (int r = 0; r < kGroup; r += 4) {
                if (table + r < a_.p.tables) copy_16_bytes(to + r * 128, from + r * row_bytes);
            }
        }
        commit_copies();
    }
    // Norms of the tokens whose scores this lane sums up: as they lie in memory, to be waited for after the look-ups.
    // The lane that copies the piece they are in has their page.
    __device__ __forceinline__ void load_norms(int unit, const int (&page)[L::kWords], Norms (&norm)[L::kWords]) const {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int w = 0; w < L::kWords; w++) {
            const int at = position(unit, w) + lane * L::kTokensPerWord;
            const int64_t own_page = __shfl_sync(~0u, page[w], lane >> 2);
            const T* from = static_cast<const T*>(a_.p.norm_cache) +
                            ((own_page * a_.p.kv_heads + head_) << a_.page_shift) + (at & (a_.p.page_size - 1));
            norm[w] = __ldg(reinterpret_cast<const Norms*>(from));
        }
    }

  private:
    const Arguments& a_;
    const Item& item_;
    int head_, begin_;
};

template <typename T, int CODE_BYTES, int HEADS>
__global__ __launch_bounds__(kMaxWarps * 32) void score_kernel(const __grid_constant__ Arguments a,
                                                               const __grid_constant__ ScorePlan plan) {
    using L = Layout<CODE_BYTES, HEADS>;
    using W = Walk<T, CODE_BYTES, HEADS>;
    extern __shared__ __align__(128) char shared[];
    __shared__ float weight[4];
    const int warp = threadIdx.x >> 5, warps = blockDim.x >> 5, lane = threadIdx.x & 31;
    const int kv_head = blockIdx.y / plan.head_blocks;
    const bool by_kv_head = a.select_heads == a.p.kv_heads;
    const int histograms = by_kv_head ? 1 : HEADS;
    const SharedPlan room = SharedPlan::make<CODE_BYTES, HEADS>(a, warps, histograms);
    char* low = shared;
    char* high = low + room.low_bytes;
    char* stages = high + room.high_bytes;
    uint32_t* histogram = reinterpret_cast<uint32_t*>(stages + room.stage_bytes);  // two 16-bit counts a word

    const Item item = a.item[blockIdx.z];
    if (item.mode != kItemSparse) return;
    const Candidates candidates(a, item.length);
    const int begin = candidates.begin();
    const int units = (item.length - begin + L::kUnit - 1) / L::kUnit;
    const int share = (units + gridDim.x - 1) / gridDim.x;
    const int first_unit = blockIdx.x * share, last_unit = min(units, first_unit + share);
    if (first_unit >= last_unit) return;

    const int64_t first_selection = static_cast<int64_t>(blockIdx.z) * a.select_heads;
    const W walk(a, item, kv_head, begin);
    const uint32_t stage = static_cast<uint32_t>(__cvta_generic_to_shared(stages)) + warp * L::kStageBytes;
    const uint32_t low_address = static_cast<uint32_t>(__cvta_generic_to_shared(low));
    const uint32_t high_address = static_cast<uint32_t>(__cvta_generic_to_shared(high));
    const int groups = (a.p.tables + kGroup - 1) / kGroup;

    for (int pass = 0; pass < plan.passes; pass++) {
        const bool last_pass = pass == plan.passes - 1;
        Heads heads;
        if (CODE_BYTES == 1 && by_kv_head) {
            heads = Heads{0, a.group};
        } else {
            heads.first = (pass + blockIdx.y % plan.head_blocks) * HEADS;
            heads.count = min(HEADS, a.group - heads.first);
        }
        const float* logit = a.logit + (static_cast<int64_t>(blockIdx.z) * a.p.query_heads + kv_head * a.group) *
                                           a.p.tables * a.p.planes_per_table;
        // The first copies run while the table is built, but for the last warps', in whose stages it is prepared.
        int unit = first_unit + warp, page[L::kWords], next_page[L::kWords];
        const int building = max(0, room.stage_bytes + room.histogram_bytes - room.scratch_bytes);
        const bool early = (warp + 1) * L::kStageBytes <= building;
        if (unit < last_unit) {
            walk.load_pages(unit, page);
            walk.check(page);
            if (early) walk.copy(unit, 0, page, stage);
        }
        build_tables<CODE_BYTES, HEADS>(a, logit, heads, room.regions, low, high,
                                        reinterpret_cast<float4*>(stages + building), weight);
        if (last_pass) {
            for (int i = threadIdx.x; i < room.histogram_bytes / 4; i += blockDim.x) histogram[i] = 0;
            __syncthreads();
        }
        const bool shared_score = by_kv_head && CODE_BYTES == 2;
        const int outputs = by_kv_head ? 1 : heads.count;

        // From a word's sums to keys: store them, count a sample of them.
        const auto finish = [&](int first, const Sums<CODE_BYTES, HEADS>& sums,
                                const typename W::Norms& norm) __attribute__((always_inline)) {
            const int at = first + lane * L::kTokensPerWord;
            const bool inside = at >= candidates.first && at + L::kTokensPerWord <= candidates.last;
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                if (h >= outputs) break;
                const int selecting = by_kv_head ? kv_head : kv_head * a.group + heads.first + h;
                uint32_t key[L::kTokensPerWord];
#pragma unroll
                for (int t = 0; t < L::kTokensPerWord; t++) {
                    float score = weight[h] * sums.head(t, h);
                    if (shared_score) {
                        score = 0.f;
#pragma unroll
                        for (int g = 0; g < HEADS; g++) {
                            if (g < heads.count) score += weight[g] * sums.head(t, g);
                        }
                        if (plan.passes > 1) {
                            float* partial = a.score_partial + at + t +
                                             (static_cast<int64_t>(blockIdx.z) * a.p.kv_heads + kv_head) * a.key_stride;
                            if (pass > 0) score += *partial;
                            if (!last_pass) *partial = score;
                        }
                    }
                    key[t] = score_key(score * to_float(reinterpret_cast<const T*>(&norm)[t]));
                }
                if (!last_pass) continue;
                if (!inside) {
#pragma unroll
                    for (int t = 0; t < L::kTokensPerWord; t++) {
                        const int p = at + t;
                        if (p < candidates.first || p >= candidates.last) {
                            key[t] = p >= candidates.visible && p < item.length ? kFixedKey : 0;
                        }
                    }
                }
                // The sample: every kTokensPerWord-th token.
                if (at >= candidates.first && at < candidates.last) {
                    const uint32_t bin = key[0] >> kFineBits;
                    atomicAdd(&histogram[(h * kHistogramBins + bin) >> 1], bin & 1 ? 65536u : 1u);
                }
                uint16_t* to = a.score_key + (first_selection + selecting) * a.key_stride + at;
                if constexpr (L::kTokensPerWord == 4) {
                    *reinterpret_cast<uint2*>(to) = make_uint2(key[0] | key[1] << 16, key[2] | key[3] << 16);
                } else {
                    *reinterpret_cast<uint32_t*>(to) = key[0] | key[1] << 16;
                }
            }
        };

        // Warps hide each other's latency: a warp waits for its copy, but has the next unit copied while it finishes
        // one.
        if (!early && unit < last_unit) walk.copy(unit, 0, page, stage);
        for (; unit < last_unit; unit += warps) {
            Sums<CODE_BYTES, HEADS> sums[L::kWords];
            typename W::Norms norm[L::kWords];
            const bool more = unit + warps < last_unit;
            if (more) walk.load_pages(unit + warps, next_page);
            walk.load_norms(unit, page, norm);
            for (int group = 0; group < groups; group++) {
                wait_for_copies();
                __syncwarp();
                look_up(sums, stage, low_address, high_address, group, a.p.planes_per_table);
                __syncwarp();
                if (group + 1 < groups) walk.copy(unit, group + 1, page, stage);
            }
            if (more) {
                walk.check(next_page);
                walk.copy(unit + warps, 0, next_page, stage);
            }
#pragma unroll
            for (int w = 0; w < L::kWords; w++) {
                finish(walk.position(unit, w), sums[w], norm[w]);
                page[w] = next_page[w];
            }
        }
        __syncthreads();
        if (last_pass) {
            const int selecting = by_kv_head ? kv_head : kv_head * a.group + heads.first;
            for (int i = threadIdx.x; i < outputs * kHistogramBins / 2; i += blockDim.x) {
                const uint32_t both = histogram[i];
                uint32_t* to = a.histogram + (first_selection + selecting) * kHistogramBins + 2 * i;
                if (both & 0xffff) atomicAdd(to, both & 0xffff);
                if (both >> 16) atomicAdd(to + 1, both >> 16);
            }
        }
    }
}

template <int CODE_BYTES, int HEADS>
bool try_plan(const Arguments& a, const Device& device, ScorePlan& plan) {
    const bool by_kv_head = a.select_heads == a.p.kv_heads;
    for (int warps = kMaxWarps; warps > 0; warps--) {
        const SharedPlan room = SharedPlan::make<CODE_BYTES, HEADS>(a, warps, by_kv_head ? 1 : HEADS);
        if (CODE_BYTES == 2 && room.regions << (a.p.planes_per_table - 8) > 256) return false;
        if (room.total + 1024 > device.shared_memory) continue;  // 1 KB: static shared memory
        plan.heads = HEADS;
        plan.warps = warps;
        plan.shared_memory = room.total;
        return true;
    }
    return false;
}

template <typename T, int CODE_BYTES, int HEADS>
cudaError_t launch_typed(const Arguments& a, const ScorePlan& plan, cudaStream_t stream) {
    const auto kernel = score_kernel<T, CODE_BYTES, HEADS>;
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_memory);
    if (status != cudaSuccess) return status;
    const Launch launch(dim3(plan.chunks, a.p.kv_heads * plan.head_blocks, a.items), dim3(plan.warps * 32),
                        plan.shared_memory, stream);
    return launch(kernel, a, plan);
}

template <int CODE_BYTES, int HEADS>
cudaError_t launch_any(const Arguments& a, const ScorePlan& plan, cudaStream_t stream) {
    return a.p.dtype == SOCKET_TRT_FLOAT16 ? launch_typed<__half, CODE_BYTES, HEADS>(a, plan, stream)
                                           : launch_typed<__nv_bfloat16, CODE_BYTES, HEADS>(a, plan, stream);
}

}  // namespace

ScorePlan plan_score(const Arguments& a, const Device& device) {
    ScorePlan plan{};
    const bool by_kv_head = a.select_heads == a.p.kv_heads;
    if (a.code_bytes == 1) {
        // A KV head's sum is one number; query heads of their own come four, two or one to an entry.
        if (by_kv_head || a.group == 1) {
            try_plan<1, 1>(a, device, plan);
        } else if (a.group == 2) {
            try_plan<1, 2>(a, device, plan);
        } else {
            try_plan<1, 4>(a, device, plan);
        }
    } else {
        const bool found = (a.group > 2 && try_plan<2, 4>(a, device, plan)) ||
                           (a.group > 1 && try_plan<2, 2>(a, device, plan)) || try_plan<2, 1>(a, device, plan);
        (void)found;
    }
    if (plan.heads == 0) return plan;
    const int blocks_of_heads = (a.group + plan.heads - 1) / plan.heads;
    plan.passes = by_kv_head && a.code_bytes == 2 ? blocks_of_heads : 1;
    plan.head_blocks = by_kv_head ? 1 : blocks_of_heads;
    // One block fills a multiprocessor: as many chunks as leave the fewest multiprocessors idle in the last wave, and
    // enough that a 16-bit count of the histogram cannot overflow.
    const int lanes = a.items * a.p.kv_heads * plan.head_blocks;
    const int units = (a.max_length + kScoreUnit - 1) / kScoreUnit;
    const int least = (a.max_length + 65535 - kScoreUnit) / (65536 - kScoreUnit);
    int best = least > 1 ? least : 1;
    double best_waste = 1e30;
    for (int chunks = best; chunks <= best + device.multiprocessors && chunks <= units; chunks++) {
        const int waves = (lanes * chunks + device.multiprocessors - 1) / device.multiprocessors;
        // Time in units of one lane's whole work, with a block's start-up as 1/64 of ... 2,048 tokens.
        const double time = waves * (static_cast<double>(a.max_length) / chunks + 2048.0);
        if (time < best_waste * 0.999) {
            best_waste = time;
            plan.chunks = chunks;
        }
    }
    if (plan.chunks == 0) plan.chunks = best;
    return plan;
}

cudaError_t launch_score(const Arguments& a, const ScorePlan& plan, cudaStream_t stream) {
    if (a.code_bytes == 1) {
        if (plan.heads == 4) return launch_any<1, 4>(a, plan, stream);
        if (plan.heads == 2) return launch_any<1, 2>(a, plan, stream);
        return launch_any<1, 1>(a, plan, stream);
    }
    if (plan.heads == 4) return launch_any<2, 4>(a, plan, stream);
    if (plan.heads == 2) return launch_any<2, 2>(a, plan, stream);
    return launch_any<2, 1>(a, plan, stream);
}

}  // namespace socket_trt
