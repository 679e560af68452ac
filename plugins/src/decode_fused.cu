// The whole of a sparse decode in one kernel, for steps of few sequences: scores, selection and attention.
//
// Nothing that a query head does depends on another KV head.  So the blocks of a *group* work for the query heads (up
// to four) of one KV head of an item, and wait for nobody but each other, at counters in global memory.  All blocks of
// the grid run at once (a cooperative launch, one block a multiprocessor), so that waiting is safe.
//
// 1. Each block scores a sample of its tokens and adds the keys to a histogram of the group, from which all blocks find
// the same bound for each head: very likely the budget's keys are above it, and not many more.
//
// 2. Each block scores all of its tokens.  A warp has a run of consecutive tokens, and a *segment* of a list, with room
// for all of them, that takes those above the bound: key and place.  No other score is ever written.
//
// 3. The heads share the group's blocks.  Each block reads all that was collected of its head, finds the budget's last
// key, and lists an equal part of the tokens that are chosen, in order of position.
//
// 4. It attends to them; the last of a head's blocks joins the parts.
//
// Should the sample have misled, so that fewer keys than the budget were collected, the group collects again above a
// lower bound, and then all of them.
#include <cmath>

#include "fused_select.cuh"
#include "launchers.h"

namespace socket_trt {
namespace {

using namespace fused;

constexpr int kMostSets = 16;         // groups that are worth it: with more, a group has too few blocks
constexpr int kSampleUnits = 64;      // that a group samples, each eight pieces from everywhere
constexpr int kLeastSampled = 16384;  // tokens; of fewer, all are collected

// A warp's own places while it scores.
struct Scoring {
    Walk<1, 64>& walk;
    uint32_t (&stage)[kStages];
    uint32_t entries;
    QuadSum quad;
    int tables;
    bool half;
};

// A block's sample: as many units as sampling warps, whose pieces of 16 tokens are spread over the block's tokens.
struct Sample {
    int warps;
    int begin, pieces;  // of the block

    __device__ Sample(const Work& w)
        : warps(w.last - w.first < kLeastSampled ? 0 : clamp(kSampleUnits / w.blocks, 1, kWarps)) {
        begin = w.begin + w.first_unit(w.block) * kUnit;
        pieces = (w.first_unit(w.block + 1) - w.first_unit(w.block)) * 8;
    }
    // Of the calling warp's eight pieces.
    __device__ __forceinline__ int position(int piece) const {
        return begin + ((threadIdx.x >> 5) * 8 + piece) * pieces / (warps * 8) * kPiece;
    }
};

__device__ void copy_sample(const Sample& sample, const CodeRows<1, 64>& rows, int tables,
                            const uint32_t (&stage)[kStages]) {
    static_assert(kStages * kGroup >= 64, "all hash tables of a unit fit the stages");
    const int at = sample.position(threadIdx.x & 7);
    const char* from = rows.piece(at, rows.load_page(at));
#pragma unroll
    for (int s = 0; s < kStages; s++) {
        if (s * kGroup < tables) rows.copy(rows.lane_rows(stage[s]), from, tables - s * kGroup);
        from = rows.next_group(from);
    }
    commit_copies();
}

// Count the keys of a warp's sample, which lies in its stages, in the block's histogram [kHeads, kSampleBins].
template <int PACKING>
__device__ void count_sample(const Arguments& a, const Work& w, const Sample& sample, const CodeRows<1, 64>& rows,
                             const Scoring& scoring, uint32_t* histogram) {
    using H = LaneHeads<PACKING>;
    const int lane = threadIdx.x & 31;
    const int at = sample.position(lane >> 2) + (lane & 3) / 2 * kOwnTokens;
    Norms<kOwnTokens> norms;
    norms.load(a, rows.checked(rows.load_page(at)), w.kv_head, at);
    int32_t sum[Layout<1, 64>::kProducts][4] = {};
#pragma unroll
    for (int s = 0; s < kStages; s++) {
        if (s * kGroup < scoring.tables) {
            look_up<1, 64>(sum, scoring.stage[s], scoring.entries + s * kGroup * 4, scoring.quad);
        }
    }
    uint32_t key[H::kCount][kOwnTokens / 2];
    make_keys<1, 64, PACKING>(key, sum, norms, scoring.half);
    const uint32_t inside = bits_between(at, w.first, w.last);
#pragma unroll
    for (int i = 0; i < H::kCount; i++) {
        const uint4 keys = make_uint4(key[i][0], key[i][1], key[i][2], key[i][3]);
        uint32_t* bins = histogram + H::head(i) * kSampleBins;
        for (uint32_t left = H::exists(i, w.heads.count) ? inside : 0; left; left &= left - 1) {
            atomicAdd(bins + (bin_in(keys, __ffs(left) - 1) >> kSampleShift), 1u);
        }
    }
}

// A head's bounds for all rounds, by one warp from the group's histogram of its sample; a bin's keys are taken as
// evenly spread.  Never above the sample's largest bin, so that bounds are numbers.
__device__ void find_bounds(const uint32_t* histogram, float share, int head, Control& control) {
    constexpr int kOwn = kSampleBins / 32;
    const int lane = threadIdx.x & 31;
    uint32_t count[kOwn], sum = 0;  // the highest bins first
#pragma unroll
    for (int v = 0; v < kOwn / 4; v++) {
        const uint4 x = __ldcg(reinterpret_cast<const uint4*>(histogram) + kSampleBins / 4 - 1 - lane * (kOwn / 4) - v);
        count[4 * v] = x.w, count[4 * v + 1] = x.z, count[4 * v + 2] = x.y, count[4 * v + 3] = x.x;
        sum += x.x + x.y + x.z + x.w;
    }
    const uint32_t until = inclusive_warp_sum(sum);
    const float expected = share * static_cast<float>(__shfl_sync(~0u, until, 31));
    // More than the budget's share by four standard deviations and an eighth; then four times as many; then all.
    const uint32_t wanted[kRounds - 1] = {
        static_cast<uint32_t>(expected * 1.125f + 4.f * sqrtf(expected)) + 4,
        static_cast<uint32_t>(expected * 4.f) + 64,
    };
#pragma unroll
    for (int round = 0; round < kRounds - 1; round++) {
        uint32_t above = until - sum, bound = 0;
#pragma unroll
        for (int i = 0; i < kOwn; i++) {
            const uint32_t missing = wanted[round] - above;
            if (above < wanted[round] && missing <= count[i]) {
                const uint32_t next_bin = kSampleBins - lane * kOwn - i;
                bound = (next_bin << kSampleShift) - ((missing << kSampleShift) + count[i] - 1) / count[i];
            }
            above += count[i];
        }
        bound = __reduce_max_sync(~0u, bound);
        if (lane == 0) control.bound[round][head] = bound;
    }
    if (lane == 0) control.bound[kRounds - 1][head] = 0;
}

// Score a warp's run of tokens, and collect the keys from each head's bound on in its segments.
template <int PACKING>
__device__ void collect(const Arguments& a, const Work& w, Scoring& scoring, const uint32_t* bounds, Control& control) {
    using H = LaneHeads<PACKING>;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, parity = lane & 1;
    const int first_unit = w.first_unit(w.block, warp), last_unit = w.first_unit(w.block, warp + 1);
    uint32_t bound[H::kCount], collected[H::kCount] = {};
    uint32_t* segment[H::kCount];
#pragma unroll
    for (int i = 0; i < H::kCount; i++) {
        const int head = H::exists(i, w.heads.count) ? H::head(i) : 0;
        bound[i] = bound_of(bounds[head]);
        segment[i] = w.candidate_row(a, head) + first_unit * kUnit;
    }
    int norm_page = scoring.walk.load_page(first_unit, g);
    for (int unit = first_unit; unit < last_unit; unit++) {
        const int offset = (unit - first_unit) * kUnit + lane_token<1, 64>();
        const int at = w.begin + first_unit * kUnit + offset;
        Norms<kOwnTokens> norms;
        norms.load(a, scoring.walk.checked(norm_page), w.kv_head, at);
        norm_page = scoring.walk.load_page(unit + 1, g);
        int32_t sum[Layout<1, 64>::kProducts][4] = {};
        look_up_unit(sum, scoring.walk, scoring.stage, scoring.entries, scoring.tables, scoring.quad);
        uint32_t key[H::kCount][kOwnTokens / 2];
        make_keys<1, 64, PACKING>(key, sum, norms, scoring.half);

        // Lanes of one parity have the same heads, in order of position: a sum over those before, two heads in a word.
        const uint32_t inside = bits_between(at, w.first, w.last);
        uint32_t wanted[H::kCount], own = 0;
#pragma unroll
        for (int i = 0; i < H::kCount; i++) {
            const uint32_t above = keys_from(make_uint4(key[i][0], key[i][1], key[i][2], key[i][3]), bound[i]);
            wanted[i] = H::exists(i, w.heads.count) ? above & inside : 0;
            own += __popc(wanted[i]) << 16 * i;
        }
        uint32_t until = own;
#pragma unroll
        for (int step = 2; step < 32; step *= 2) {
            const uint32_t below = __shfl_up_sync(~0u, until, step);
            if (lane >= step) until += below;
        }
        const uint32_t total = __shfl_sync(~0u, until, 30 + parity);
#pragma unroll
        for (int i = 0; i < H::kCount; i++) {
            const uint4 keys = make_uint4(key[i][0], key[i][1], key[i][2], key[i][3]);
            uint32_t place = collected[i] + ((until - own) >> 16 * i & 0xffff);
            for (uint32_t left = wanted[i]; left; left &= left - 1) {
                const int token = __ffs(left) - 1;
                segment[i][place++] = bin_in(keys, token) << kOffsetBits | (offset + token);
            }
            collected[i] += total >> 16 * i & 0xffff;
        }
    }
    if (lane < 2) {
#pragma unroll
        for (int i = 0; i < H::kCount; i++) {
            if (!H::exists(i, w.heads.count)) continue;
            w.counts(a, H::head(i))[w.block * kWarps + warp] = collected[i];
            atomicAdd(&control.collected[H::head(i)], collected[i]);
        }
    }
}

// Scoring and collecting, by the whole group, until every head has enough.  Returns how many keys the segment of this
// thread's number has of the block's head, and leaves zeros in the histogram of keys.
template <int PACKING>
__device__ uint32_t find_candidates(const Arguments& a, const Work& w, char* shared, Control& control) {
    Group& group = reinterpret_cast<Group*>(a.fused_state)[w.set];
    const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    if (base < kSystemShared || base > kSystemShared + kStaticShared) __trap();
    const Places<1, 64> places{base, kWarps * kStages};
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int first_unit = w.first_unit(w.block, warp), last_unit = w.first_unit(w.block, warp + 1);
    uint32_t stage[kStages], own_stage[kStages];
#pragma unroll
    for (int s = 0; s < kStages; s++) {
        stage[s] = places.stage(warp * kStages + s);
        own_stage[s] = lane_stage(stage[s]);
    }
    Walk<1, 64> walk(a, w.item.row, w.kv_head, w.begin, first_unit, last_unit, 1, 0, a.p.tables, stage);
    Scoring scoring{walk,      own_stage,  lane_entries(places.table()),
                    QuadSum(), a.p.tables, a.p.dtype == SOCKET_TRT_FLOAT16};
    const auto fill_stages = [&] {
        for (int s = 0; s < kStages; s++) walk.copy();
    };

    // Codes arrive while the table is built: of the sample, or the first of the tokens.
    const Sample sample(w);
    uint32_t* histogram = reinterpret_cast<uint32_t*>(shared + kSampleAt);
    if (warp < sample.warps) {
        copy_sample(sample, walk.rows(), a.p.tables, stage);
    } else {
        fill_stages();
    }
    for (int i = threadIdx.x; i < kHeads * kSampleBins; i += kThreads) histogram[i] = 0;
    if (threadIdx.x < kHeads) control.collected[threadIdx.x] = 0;
    if (threadIdx.x < kRounds * kHeads) control.bound[threadIdx.x / kHeads][threadIdx.x % kHeads] = 0;
    const float* probability = a.probability + (static_cast<int64_t>(w.index) * a.p.query_heads + w.kv_head * a.group) *
                                                   a.p.planes_per_table * a.p.tables;
    build_table<1, 64, PACKING>(a, probability, w.heads, 0,
                                *reinterpret_cast<Sides<1, 64>*>(shared + (places.sides() - base)),
                                shared + (places.table() - base));

    uint32_t arrivals = 0;
    if (sample.warps > 0) {
        if (warp < sample.warps) {
            wait_for_copies<0>();
            __syncwarp();
            count_sample<PACKING>(a, w, sample, walk.rows(), scoring, histogram);
            __syncwarp();
            fill_stages();
        }
        __syncthreads();
        for (int i = threadIdx.x; i < kHeads * kSampleBins; i += kThreads) {
            if (histogram[i] > 0) atomicAdd(&group.sample[0][0] + i, histogram[i]);
        }
        arrive_at_group(group);
        wait_for_group(group, arrivals += w.blocks);
        if (warp < w.heads.count) {
            find_bounds(group.sample[warp], static_cast<float>(w.budget) / (w.last - w.first), warp, control);
        }
        __syncthreads();
    }

    uint32_t own_count = 0;
    for (int round = 0; round < kRounds; round++) {
        if (round > 0) {
            walk.restart(w.first_unit(w.block, warp));
            fill_stages();
        }
        collect<PACKING>(a, w, scoring, control.bound[round], control);
        __syncthreads();
        if (threadIdx.x < w.heads.count) {
            atomicAdd(&group.collected[round][threadIdx.x], control.collected[threadIdx.x]);
            control.collected[threadIdx.x] = 0;
        }
        arrive_at_group(group);
        uint4* bins = reinterpret_cast<uint4*>(shared + kCountAt);
        for (int i = threadIdx.x; i < kBins / 4; i += kThreads) bins[i] = make_uint4(0, 0, 0, 0);
        wait_for_group(group, arrivals += w.blocks);
        const int head = w.head();
        own_count = threadIdx.x < w.segments() && head < w.heads.count ? __ldcg(w.counts(a, head) + threadIdx.x) : 0;
        const uint32_t total = lane < w.heads.count ? __ldcg(&group.collected[round][lane]) : ~0u;
        if (__all_sync(~0u, total >= static_cast<uint32_t>(w.budget))) break;
    }
    return own_count;
}

// Attend to a part of a head's list; the last part of a head joins them all.
template <typename T, int HEAD_SIZE>
__device__ void attend(const Arguments& a, const Work& w, int head, int part, int parts, const int32_t* list,
                       uint32_t count, char* shared, Control& control) {
    WarpSums& sums = *reinterpret_cast<WarpSums*>(shared + kSumsAt);
    const int64_t row = w.row(a, head);
    const int64_t at = (static_cast<int64_t>(w.first_head + head) * a.p.tokens + w.item.token) * HEAD_SIZE;
    attend_list<T, HEAD_SIZE>(a, static_cast<const T*>(a.p.query) + at, w.kv_head, list, count, shared + kRingAt, sums);
    __syncthreads();
    const int d = threadIdx.x;
    Average all{};
    if (d < HEAD_SIZE) all = combine_warps(sums, d);
    if (parts > 1) {
        const int64_t first = row * max(a.sparse_splits, a.dense_splits);
        float2* stats = reinterpret_cast<float2*>(a.partial_stats) + first;
        float* partial = a.partial_output + first * HEAD_SIZE + d;
        if (d < HEAD_SIZE) partial[part * HEAD_SIZE] = all.output;
        if (d == 0) stats[part] = make_float2(all.maximum, all.sum);
        __syncthreads();
        if (d == 0) {
            int32_t arrived;
            asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
                         : "=r"(arrived)
                         : "l"(a.arrived + row)
                         : "memory");
            control.last = arrived == parts - 1;
        }
        __syncthreads();
        if (!control.last) return;
        if (d < HEAD_SIZE) {
            all = combine_parts(
                parts, [&](int i) { return __ldcg(stats + i); },
                [&](int i) { return __ldcg(partial + i * HEAD_SIZE); });
        }
    }
    if (d < HEAD_SIZE) static_cast<T*>(a.p.output)[at + d] = from_float<T>(all.value());
}

template <int PACKING>
__global__ __launch_bounds__(kThreads, 1) void decode_fused_kernel(const __grid_constant__ Arguments a,
                                                                   const uint32_t stages) {
    extern __shared__ __align__(128) char shared[];
    __shared__ Control control;
    uint32_t own_count = 0;
    {
        const Work w(a);
        if (w.item.mode != kItemSparse) return;
        if (w.budget > 0) own_count = find_candidates<PACKING>(a, w, shared, control);
    }
    const Work w(a);  // once more, so that scoring need not keep it
    const int parts = w.parts(), head = w.head(), part = w.block % parts;
    // From here on a block is alone with its part of a head's list.
    if (head == w.heads.count || !(stages & SOCKET_TRT_STAGE_SELECT)) return;
    const uint32_t from = static_cast<uint64_t>(w.listed) * part / parts;
    const uint32_t until = static_cast<uint64_t>(w.listed) * (part + 1) / parts;
    int32_t* slots = a.slot + w.row(a, head) * a.list_stride;
    int32_t* list = until - from <= kMostListed ? reinterpret_cast<int32_t*>(shared + kListAt) : slots + from;
    if (part == 0 && threadIdx.x == 0) a.listed[w.row(a, head)] = w.listed;
    if (w.budget > 0) list_chosen(a, w, head, own_count, shared, control, from, until, list);
    list_slots(a, w, from, until, list, slots);
    if (!(stages & SOCKET_TRT_STAGE_ATTEND)) return;
    const uint32_t count = until - from;
    if (a.p.dtype == SOCKET_TRT_FLOAT16) {
        if (a.p.head_size == 64) {
            attend<__half, 64>(a, w, head, part, parts, list, count, shared, control);
        } else {
            attend<__half, 128>(a, w, head, part, parts, list, count, shared, control);
        }
    } else if (a.p.head_size == 64) {
        attend<__nv_bfloat16, 64>(a, w, head, part, parts, list, count, shared, control);
    } else {
        attend<__nv_bfloat16, 128>(a, w, head, part, parts, list, count, shared, control);
    }
}

}  // namespace

FusedPlan plan_decode_fused(const Arguments& a, const Device& device) {
    FusedPlan plan{};
    const int heads = a.group < kHeads ? a.group : kHeads;
    const int64_t sets = static_cast<int64_t>(a.items) * a.p.kv_heads * ((a.group + kHeads - 1) / kHeads);
    const bool computed = a.p.planes_per_table <= 8 && a.p.tables <= 64 && a.select_heads == a.p.query_heads &&
                          (a.p.head_size == 64 || a.p.head_size == 128);
    const bool fits = kSharedBytes + kStaticShared <= device.shared_memory;  // from compute capability 9.0 on
    if (!a.sparse || sets == 0 || sets > kMostSets || !computed || !fits) return plan;
    const int most = device.multiprocessors / static_cast<int>(sets);
    plan.blocks = (most < kMostBlocks ? most : kMostBlocks) / heads * heads;
    if (plan.blocks == 0) return plan;
    plan.state_words = sets * static_cast<int64_t>(sizeof(Group) / sizeof(uint32_t));
    plan.candidate_counts = sets * kHeads * plan.blocks * kWarps;
    // Of a warp's run of tokens, every place has a number.
    const int64_t warps = static_cast<int64_t>(plan.blocks) * kWarps, units = a.key_stride / kUnit;
    plan.fits_length = (units / warps + 2) * kUnit <= 1 << kOffsetBits;
    return plan;
}

cudaError_t launch_decode_fused(const Arguments& a, cudaStream_t stream) {
    const auto kernel = a.group == 1   ? decode_fused_kernel<kOneSum>
                        : a.group == 2 ? decode_fused_kernel<kTwoHeads>
                                       : decode_fused_kernel<kFourHeads>;
    const cudaError_t status = set_up(kernel, kSharedBytes);
    if (status != cudaSuccess) return status;
    const int sets = a.items * a.p.kv_heads * ((a.group + kHeads - 1) / kHeads);
    const uint32_t stages = a.p.stages == 0 ? ~0u : a.p.stages;
    Launch launch(dim3(sets * a.fused_blocks), dim3(kThreads), kSharedBytes, stream);
    return launch.cooperative()(kernel, a, stages);
}

}  // namespace socket_trt
