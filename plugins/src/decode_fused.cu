// The whole of a sparse decode in one kernel, for steps of few sequences: scores, selection and attention.
//
// Nothing that a query head does depends on another KV head.  So the blocks of a *group* work for the query heads (up
// to four) of one KV head of an item, and wait for nobody but each other, at counters in global memory.  All blocks of
// the grid run at once (a cooperative launch, one block a multiprocessor), so that waiting is safe.
//
//   1. Each block scores a sample of its tokens and adds the keys to a histogram of the group, from which all blocks
//   find
//      the same bound for each head: very likely the budget's keys are above it, and not many more.
//   2. Each block scores all of its tokens.  A warp has a run of consecutive tokens, and a *segment* of a list, with
//   room
//      for all of them, that takes those above the bound: key and place.  No other score is ever written.
//   3. The heads share the group's blocks.  Each block reads all that was collected of its head, finds the budget's
//   last
//      key, and lists an equal part of the tokens that are chosen, in order of position.
//   4. It attends to them; the last of a head's blocks joins the parts.
//
// Should the sample have misled, so that fewer keys than the budget were collected, the group collects again above a
// lower bound, and then all of them.
#include <cmath>

#include "attend_list.cuh"
#include "key_histogram.cuh"
#include "launchers.h"
#include "score_pass.cuh"

namespace socket_trt {
namespace {

constexpr int kMostSets = 16;    // groups that are worth it: with more, a group has too few blocks
constexpr int kMostBlocks = 32;  // of a group: a thread for every segment
constexpr int kWarps = 16, kThreads = kWarps * 32;
constexpr int kHeads = 4;
constexpr int kRounds = 3;  // of collecting, each above a lower bound
constexpr int kUnit = Layout<1, 64>::kUnit, kOwnTokens = Layout<1, 64>::kOwnTokens, kPiece = Layout<1, 64>::kQuadTokens;
constexpr int kOffsetBits = 18;  // of a collected key's place in its warp's run of tokens
constexpr uint32_t kOffsets = (1u << kOffsetBits) - 1;

constexpr int kSampleUnits = 64;  // that a group samples, each eight pieces from everywhere
constexpr int kSampleShift = 5;   // bins of the sample's histogram are so much coarser
constexpr int kSampleBins = kBins >> kSampleShift;
constexpr int kLeastSampled = 16384;  // tokens; of fewer, all are collected

// What a group shares.  The append kernel leaves zeros here.
struct alignas(128) Group {
    uint32_t arrived;  // blocks, at all barriers so far
    uint32_t collected[kRounds][kHeads];
    alignas(128) uint32_t sample[kHeads][kSampleBins];
};

// Dynamic shared memory: what lies where, in bytes from its beginning.  Scoring's own places come first
// (Places<1, 64>): stages, the look-up table up to address 128 K, more stages, and the planes' sides.
constexpr int kScoreBytes =
    2 * kAlignedTable + (kWarps * kStages - kStagesBelowTable) * kStageBytes + sizeof(Sides<1, 64>) - kSystemShared;
constexpr int kHeldAt = 0, kCountAt = 2 * kAlignedTable - kSystemShared;  // behind the table, wherever memory begins
constexpr uint32_t kMostHeld = kCountAt / sizeof(uint32_t);
constexpr int kRingAt = 0, kListAt = kAttendRingBytes;
constexpr uint32_t kMostListed = 4096;
constexpr int kSampleAt = kScoreBytes;
constexpr int kSegmentsAt = kSampleAt + kHeads * kSampleBins * sizeof(uint32_t);
constexpr int kCoarseAt = kSegmentsAt + (kMostBlocks * kWarps + 2) * sizeof(uint2);
constexpr int kSumsAt = kCoarseAt + kCoarse * sizeof(uint32_t);
constexpr int kSharedBytes = kSumsAt + sizeof(WarpSums);
static_assert(kCountAt + kBins * sizeof(uint32_t) <= kListAt, "the list is written while bins are looked at");
static_assert(kListAt + kMostListed * sizeof(int32_t) <= kSegmentsAt, "and while segments are");
static_assert(kCoarseAt % 16 == 0 && kSumsAt % 16 == 0 && kSampleAt % 16 == 0 && kCountAt % 16 == 0, "vectors");

struct Control {
    uint32_t bound[kRounds][kHeads];
    uint32_t collected[kHeads];
    uint32_t scan[33];
    uint32_t warp_count[2][kWarps];
    uint32_t threshold, above;
    uint32_t last;
};

// All threads call both.  What blocks have written before they arrive is seen by those that have waited for them, if it
// is read past the multiprocessor's own cache.
__device__ __forceinline__ void arrive_at_group(Group& group) {
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(&group.arrived) : "memory");
    }
}
__device__ __forceinline__ void wait_for_group(const Group& group, uint32_t arrivals) {
    if (threadIdx.x == 0) {
        uint32_t arrived;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(&group.arrived) : "memory");
        } while (arrived < arrivals);
    }
    __syncthreads();
}

// What a block works on.
struct Work {
    int block, blocks;  // of the group
    int set, index;     // group; item
    int kv_head, first_head;
    Heads heads;
    Item item;
    int visible, first, last;  // of the positions [visible, length), those in [first, last) are chosen among
    int budget;                // tokens to choose; 0: none, or all, which then are not chosen among
    int begin, units;          // of scoring
    uint32_t fixed_before, listed;

    __device__ explicit Work(const Arguments& a) {
        const int head_blocks = (a.group + kHeads - 1) / kHeads;
        blocks = a.fused_blocks;
        block = blockIdx.x % blocks;
        set = blockIdx.x / blocks;
        index = set / head_blocks / a.p.kv_heads;
        kv_head = set / head_blocks % a.p.kv_heads;
        const int head_block = set % head_blocks;
        heads = Heads{head_block * kHeads, min(kHeads, a.group - head_block * kHeads)};
        first_head = kv_head * a.group + heads.first;
        item = a.item[index];
        const Candidates candidates(a, item.length);
        visible = candidates.visible;
        first = min(candidates.first, item.length);
        last = max(candidates.last, first);
        budget = attended_budget(a, item.length);
        if (last - first <= budget) {  // all are attended
            first = last = item.length;
            budget = 0;
        }
        fixed_before = first - visible;
        listed = min(fixed_before + budget + item.length - last, static_cast<uint32_t>(a.list_stride));
        begin = candidates.begin();
        units = (last - begin + kUnit - 1) / kUnit;
    }

    // First of a block's units, and of a warp's; those of warp kWarps are the next block's.
    __device__ __forceinline__ int first_unit(int b) const { return units * b / blocks; }
    __device__ __forceinline__ int first_unit(int b, int warp) const {
        const int from = first_unit(b);
        return from + (first_unit(b + 1) - from) * warp / kWarps;
    }
    // The head of the group that the block selects and attends for; heads.count: none, it is one of a few to spare.
    __device__ __forceinline__ int parts() const { return blocks / heads.count; }
    __device__ __forceinline__ int head() const { return min(block / parts(), heads.count); }
    __device__ __forceinline__ int segments() const { return blocks * kWarps; }
    // Of a head of the group, by its number there: a row for all its candidates, and the segments' counts.
    __device__ __forceinline__ int64_t row(const Arguments& a, int head) const {
        return static_cast<int64_t>(index) * a.p.query_heads + first_head + head;
    }
    __device__ __forceinline__ uint32_t* candidate_row(const Arguments& a, int head) const {
        return a.candidate + row(a, head) * a.key_stride;
    }
    __device__ __forceinline__ uint32_t* counts(const Arguments& a, int head) const {
        return a.candidates + (set * kHeads + head) * segments();
    }
};

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

// What was collected of a head, as segments by position: in shared memory if it fits, else where it was written.
struct Collected {
    const uint32_t* row;
    const uint2* segment;  // [segments + 1]: number of the first key, and of the first token
    uint32_t* held;        // nullptr: too many
    int own_segments;      // of a warp

    // use(exists, key and offset, the offsets' origin) for all that a warp's segments hold, in order.
    template <typename Use>
    __device__ __forceinline__ void for_each(Use use) const {
        const int first = (threadIdx.x >> 5) * own_segments;
        for (int s = first; s < first + own_segments; s++) {
            const uint2 from = segment[s];
            const uint32_t count = segment[s + 1].x - from.x;
            for (uint32_t i = 0; i < count; i += 32) {
                const uint32_t own = i + (threadIdx.x & 31);
                uint32_t entry = 0;
                if (own < count) entry = held != nullptr ? held[from.x + own] : __ldcg(row + from.y + own);
                use(own < count, entry, from.y);
            }
        }
    }

    // Count the keys, and hold them.
    __device__ void load(uint32_t* count) const {
        constexpr int kAtOnce = 16;
        const int lane = threadIdx.x & 31, first = (threadIdx.x >> 5) * own_segments;
        for (int base = 0; base < own_segments; base += kAtOnce) {
            const int existing = min(kAtOnce, own_segments - base);
            const uint2* own = segment + first + base;
            const uint32_t longest = __reduce_max_sync(~0u, lane < existing ? own[lane + 1].x - own[lane].x : 0);
            for (uint32_t i = lane; i - lane < longest; i += 32) {
                uint32_t entry[kAtOnce], exists = 0;
#pragma unroll
                for (int s = 0; s < kAtOnce; s++) {  // all loads before anything waits for one
                    if (s < existing && i < own[s + 1].x - own[s].x) {
                        exists |= 1u << s;
                        entry[s] = __ldcg(row + own[s].y + i);
                    }
                }
#pragma unroll
                for (int s = 0; s < kAtOnce; s++) {
                    if (exists >> s & 1) {
                        atomicAdd(count + (entry[s] >> kOffsetBits), 1u);
                        if (held != nullptr) held[own[s].x + i] = entry[s];
                    }
                }
            }
        }
    }
};

// The bin in which the budget ends, into control: all threads call it.
__device__ void find_threshold(const uint32_t* count, uint32_t* coarse, uint32_t budget, Control& control) {
    const uint32_t sum = sum_of_bins(count);
    if ((threadIdx.x & 3) == 0) coarse[threadIdx.x >> 2] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
        const Found high =
            find_bin(1, 0, budget, [&](int, int vector) { return reinterpret_cast<const uint4*>(coarse)[vector]; });
        const uint4* fine = reinterpret_cast<const uint4*>(count + high.bin * kFine);
        const Found low = find_bin(1, 0, budget - high.above, [&](int, int vector) { return fine[vector]; });
        if (threadIdx.x == 0) {
            control.threshold = high.bin * kFine + low.bin;
            control.above = high.above + low.above;
        }
    }
    __syncthreads();
}

// Positions of the chosen tokens whose places in the list are [from, until), to list[place - from].
__device__ void list_chosen(const Arguments& a, const Work& w, int head, uint32_t own_count, char* shared,
                            Control& control, uint32_t from, uint32_t until, int32_t* list) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, segments = w.segments();
    uint2* segment = reinterpret_cast<uint2*>(shared + kSegmentsAt);
    uint32_t total;
    const uint32_t before = exclusive_scan(own_count, control.scan, total);
    if (threadIdx.x < segments) {
        const int first = w.first_unit(threadIdx.x / kWarps, threadIdx.x % kWarps) * kUnit;
        segment[threadIdx.x] = make_uint2(before, first);
    }
    if (threadIdx.x == 0) segment[segments] = make_uint2(total, 0);
    __syncthreads();
    uint32_t* count = reinterpret_cast<uint32_t*>(shared + kCountAt);
    uint32_t* held = total <= kMostHeld ? reinterpret_cast<uint32_t*>(shared + kHeldAt) : nullptr;
    const Collected collected{w.candidate_row(a, head), segment, held, w.blocks};
    collected.load(count);
    __syncthreads();
    const uint32_t budget = w.budget;
    find_threshold(count, reinterpret_cast<uint32_t*>(shared + kCoarseAt), budget, control);

    // What lies before a warp's tokens, and then their own places.
    const uint32_t threshold = control.threshold, ties = budget - control.above;
    uint32_t above = 0, tied = 0;
    collected.for_each([&](bool exists, uint32_t entry, uint32_t) {
        above += exists && entry >> kOffsetBits > threshold;
        tied += exists && entry >> kOffsetBits == threshold;
    });
    above = __reduce_add_sync(~0u, above);
    tied = __reduce_add_sync(~0u, tied);
    if (lane == 0) control.warp_count[0][warp] = above, control.warp_count[1][warp] = tied;
    __syncthreads();
    const uint32_t above_before = __reduce_add_sync(~0u, lane < warp ? control.warp_count[0][lane] : 0);
    const uint32_t tied_before = min(ties, __reduce_add_sync(~0u, lane < warp ? control.warp_count[1][lane] : 0));
    Progress progress{w.fixed_before + above_before + tied_before, ties - tied_before};
    if (progress.place >= until || progress.place + above + min(tied, progress.ties_left) <= from) return;
    collected.for_each([&](bool exists, uint32_t entry, uint32_t origin) {
        const uint32_t place = progress.take(exists, entry >> kOffsetBits, threshold);
        if (place >= from && place < until) {
            list[place - from] = w.begin + static_cast<int>(origin + (entry & kOffsets));
        }
    });
}

// Positions of the tokens that are always attended, likewise; then positions become cache slots, in list and in
// `slots`.
__device__ void list_slots(const Arguments& a, const Work& w, uint32_t from, uint32_t until, int32_t* list,
                           int32_t* slots) {
    constexpr int kAtOnce = 4;
    for (uint32_t place = from + threadIdx.x; place < until; place += kThreads) {
        if (place < w.fixed_before) {
            list[place - from] = w.visible + place;
        } else if (place >= w.fixed_before + w.budget) {
            list[place - from] = w.last + (place - w.fixed_before - w.budget);
        }
    }
    __syncthreads();
    const uint32_t count = until - from;
    for (uint32_t base = threadIdx.x; base < count; base += kAtOnce * kThreads) {
        int slot[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const uint32_t own = base + i * kThreads;
            // Stages that are run apart may leave a list with holes: it is looked at defensively.
            const int position = own < count ? clamp(list[own], 0, w.item.length - 1) : 0;
            slot[i] = (read_page(a, w.item.row, position) << a.page_shift) + (position & (a.p.page_size - 1));
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const uint32_t own = base + i * kThreads;
            if (own < count) list[own] = slots[from + own] = slot[i];
        }
    }
    __syncthreads();
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
