// From scores to the list of cache slots that one selecting head of a sparse item attends to: exactly the budget, in
// order of position, of equal scores those at lower positions.  select.cu has the kernel that only lists, and
// select_attend.cu the one that goes on to attend.
//
// A cluster of blocks shares the tokens of one head, and the warps of a block share its part.  Each warp collects the
// keys from a bound on, which a sample of the row gives, and counts them in the block's histogram with a bin for every
// key. A look at all blocks' histograms, at sums of 128 bins and then at 128 bins, finds the key that the budget ends
// in, and how much of the list comes before a block's own part, which its warps then list.  Should the sample have
// misled, so that this key lies outside the histogram, all is done again with another bound.  Where there are no
// clusters (before compute capability 9.0) one block has a head for itself.
#ifndef SOCKET_TRT_SELECT_CUH_
#define SOCKET_TRT_SELECT_CUH_

#include <cmath>

#include "select_search.cuh"

namespace socket_trt {
namespace select {

// The vectors of eight keys that a warp looks at, and which of their keys are candidates.
struct Part {
    const uint4* vectors;
    int origin;       // the block's first vector: places count from it
    int begin, end;   // vectors
    int first, last;  // candidates

    // Of the keys of a lane from `key` on, the bits of those that are candidates.
    __device__ __forceinline__ uint32_t candidate_bits(int key) const {
        const int before = max(first - key, 0), until = min(last, end * 8) - key;
        const uint32_t bits = before < 32 ? ~0u << before : 0;
        return until >= 32 ? bits : until > 0 ? bits & ~0u >> (32 - until) : 0;
    }
    __device__ __forceinline__ bool all_candidates(int vector, int vectors) const {
        return vector * 8 >= first && vector + vectors <= end && (vector + vectors) * 8 <= last;
    }
};

// Copies of a part's keys that run ahead of the warp, and the stage that it looks at.
class Stages {
  public:
    __device__ __forceinline__ Stages(const Part& part, uint32_t ring)
        : vectors_(part.vectors), base_(part.begin), end_(part.end) {
#pragma unroll
        for (int s = 0; s < kStages; s++) {
            stage_[s] = ring + s * kStageBytes;
            copy(s * kStageVectors, stage_[s]);
        }
    }
    __device__ __forceinline__ void wait() const {
        wait_for_copies<kStages - 1>();
        __syncwarp();
    }
    // The first of the stage's vectors, and the lane's own of them, and its keys.
    __device__ __forceinline__ int base() const { return base_; }
    __device__ __forceinline__ uint4 vector(int v) const { return load_piece(own() + v * 16); }
    __device__ __forceinline__ uint32_t key(int i) const {
        uint16_t x;
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(own() + i * 2));
        return x;
    }
    // On to the next stage; this one is filled anew.
    __device__ __forceinline__ void advance() {
        __syncwarp();  // all lanes have looked
        copy(kStages * kStageVectors, stage_[0]);
        const uint32_t used = stage_[0];
#pragma unroll
        for (int s = 0; s + 1 < kStages; s++) stage_[s] = stage_[s + 1];
        stage_[kStages - 1] = used;
        base_ += kStageVectors;
    }

  private:
    __device__ __forceinline__ void copy(int ahead, uint32_t to) const {
        const int lane = threadIdx.x & 31, vector = base_ + ahead + lane;
#pragma unroll
        for (int i = 0; i < kStageVectors; i += 32) {
            if (vector + i < end_) copy_16_bytes(to + (lane + i) * 16, vectors_ + vector + i);
        }
        commit_copies();
    }
    __device__ __forceinline__ uint32_t own() const { return stage_[0] + (threadIdx.x & 31) * (kLaneVectors * 16); }

    const uint4* vectors_;
    int base_, end_;
    uint32_t stage_[kStages];
};

// Of eight keys, the bits of those that are at least `bound`; all are float16 numbers and positive.
__device__ __forceinline__ uint32_t keys_from(const uint4& keys, uint32_t bound) {
    const auto mask = [&](uint32_t pair) {
        return __hge2_mask(*reinterpret_cast<const __half2*>(&pair), *reinterpret_cast<const __half2*>(&bound));
    };
    const uint32_t bits = (mask(keys.x) & 0x00020001u) | (mask(keys.y) & 0x00080004u) | (mask(keys.z) & 0x00200010u) |
                          (mask(keys.w) & 0x00800040u);
    return (bits | bits >> 16) & 0xff;
}

// The page numbers of a warp's part, copied into its stages when it has collected, while it waits for others.
class Pages {
  public:
    __device__ Pages(const Arguments& a, const Part& part, uint32_t ring)
        : a_(a), ring_(ring), first_(part.begin * 8 >> a.page_shift) {}

    __device__ void copy(int row, const Part& part) const {
        const int* from = a_.p.page_table + static_cast<int64_t>(row) * a_.p.pages_per_sequence + first_;
        const int count = (min(part.end * 8, a_.max_length) - 1 >> a_.page_shift) + 1 - first_;
        for (int i = threadIdx.x & 31; i < count; i += 32) copy_4_bytes(place(i), from + i);
        commit_copies();
    }
    __device__ __forceinline__ void wait() const {
        wait_for_copies<0>();
        __syncwarp();
    }
    __device__ __forceinline__ int slot_of(int position) const {
        const uint32_t page = load_word(place((position >> a_.page_shift) - first_));
        return slot_in_page(a_, valid_page(a_, page), position);
    }

  private:
    __device__ __forceinline__ uint32_t place(int i) const { return ring_ + i * 4; }

    const Arguments& a_;
    uint32_t ring_;
    int first_;
};

// Collect a warp's candidates in bins from `least` on, in order; with `counted`, into the histogram too.  Returns their
// number, of which at most the room's capacity are held.
__device__ inline uint32_t collect(const Part& part, Stages& stages, uint32_t least, bool counted, const Room& room) {
    const int lane = threadIdx.x & 31;
    const uint32_t low = least << 1 | least << 17;
    uint32_t collected = 0;
    for (; stages.base() < part.end; stages.advance()) {
        stages.wait();
        const int key = stages.base() * 8 + lane * kLaneKeys;
        uint32_t wanted = 0;
        if (key < part.end * 8) {
#pragma unroll
            for (int v = 0; v < kLaneVectors; v++) wanted |= keys_from(stages.vector(v), low) << v * 8;
        }
        if (!part.all_candidates(stages.base(), kStageVectors)) wanted &= part.candidate_bits(key);
        const uint32_t until = collected + inclusive_warp_sum(__popc(wanted));
        const uint32_t offset = key - part.origin * 8;
        const auto take = [&](uint32_t bin, int i, uint32_t place) {
            if (counted) atomicAdd(&room.count[min(bin - least, room.bins - 1u)], 1u);
            if (place < room.capacity) room.held[place] = bin << kOffsetBits | (offset + i & kOffsets);
        };
        for (uint32_t place = until - __popc(wanted); wanted; place += 2) {  // two at once hide each other's latency
            const uint32_t others = wanted & (wanted - 1);
            const int first = __ffs(wanted) - 1, second = others ? __ffs(others) - 1 : first;
            const uint32_t first_bin = bin_of(stages.key(first)), second_bin = bin_of(stages.key(second));
            take(first_bin, first, place);
            if (others) take(second_bin, second, place + 1);
            wanted = others & (others - 1);
        }
        collected = __shfl_sync(~0u, until, 31);
    }
    __syncwarp();
    return collected;
}

// What one head attends to: fixed tokens, before and behind its candidates, and a budget of those.
struct Choice {
    int first, last;         // candidates
    int visible;             // first position inside the sliding window
    uint32_t budget;         // 0: all visible tokens are fixed, or none else is wanted
    uint32_t before, fixed;  // fixed tokens in front of the candidates, and altogether

    __device__ __forceinline__ Choice(const Arguments& a, int length) {
        const Candidates candidates(a, length);
        first = min(candidates.first, length), last = max(candidates.last, first), visible = candidates.visible;
        budget = attended_budget(a, length);
        if (last - first <= budget) first = last = length, budget = 0;
        before = first - visible, fixed = before + length - last;
    }
    __device__ __forceinline__ int fixed_position(uint32_t i) const {
        return (i < before ? visible : last - before) + i;
    }
    __device__ __forceinline__ uint32_t fixed_place(uint32_t i) const { return i < before ? i : i + budget; }
};

// Slots of a list that each block of a cluster attends to, such that each warp's share is a multiple of `step`.
__host__ __device__ inline int slots_of_block(int listed, int blocks, int step) {
    const int parts = blocks * kWarps;
    return ((listed + parts - 1) / parts + step - 1) / step * (step * kWarps);
}

// The list of a head's cache slots, by position.  STEP > 0: it lies in the shared memory of the cluster's blocks, equal
// parts of `part` slots each, such that each warp's share is a multiple of STEP, and `own` of them in this block; 0: in
// the workspace.
template <int STEP>
struct List {
    const Arguments& a;
    const Channel channel;
    int row, listed;
    int32_t* slots;
    int part = 0, own = 0;

    __device__ __forceinline__ List(const Arguments& a, Shared& shared, int row, int64_t index, const Choice& choice)
        : a(a),
          channel(shared.arrived[kSlots], gridDim.x),
          row(row),
          listed(min(choice.fixed + choice.budget, static_cast<uint32_t>(a.list_stride))) {
        if constexpr (STEP > 0) {
            part = slots_of_block(listed, gridDim.x, STEP);
            own = clamp(listed - static_cast<int>(blockIdx.x) * part, 0, part);
            slots = reinterpret_cast<int32_t*>(shared.collected + a.select_capacity);
        } else {
            slots = a.slot + index * a.list_stride;
        }
    }
    __device__ __forceinline__ int slot_of(int position) const {
        return slot_in_page(a, read_page(a, row, position), position);
    }
    __device__ __forceinline__ void put(uint32_t place, int slot) const {
        if (place >= static_cast<uint32_t>(listed)) return;
        if constexpr (STEP > 0) {
            int block = 0;
            for (; place >= static_cast<uint32_t>(part); place -= part) block++;
            channel.send(reinterpret_cast<uint32_t*>(slots) + place, block, slot);
        } else {
            slots[place] = slot;
        }
    }
};

// A thread's fixed tokens, of which it has looked up the first one's slot early.
class FixedTokens {
  public:
    __device__ __forceinline__ FixedTokens(const Choice& choice) : choice_(choice) {}
    template <int STEP>
    __device__ __forceinline__ void look_up(const List<STEP>& list) {
        if (own() < choice_.fixed) slot_ = list.slot_of(choice_.fixed_position(own()));
    }
    template <int STEP>
    __device__ __forceinline__ void put(const List<STEP>& list) const {
        if (own() < choice_.fixed) list.put(choice_.fixed_place(own()), slot_);
        for (uint32_t i = own() + gridDim.x * kThreads; i < choice_.fixed; i += gridDim.x * kThreads) {
            list.put(choice_.fixed_place(i), list.slot_of(choice_.fixed_position(i)));
        }
    }

  private:
    __device__ __forceinline__ uint32_t own() const { return blockIdx.x * kThreads + threadIdx.x; }

    const Choice& choice_;
    int slot_ = 0;
};

// How many of a warp's collected tokens are above the threshold (lower half) or at it (upper half).
__device__ inline uint32_t count_collected(const uint32_t* held, uint32_t count, uint32_t threshold) {
    uint32_t above = 0, tied = 0;
    for (uint32_t base = 0; base < count; base += 32) {
        const uint32_t own = base + (threadIdx.x & 31);
        const uint32_t bin = own < count ? held[own] >> kOffsetBits : 0;
        above += __popc(__ballot_sync(~0u, own < count && bin > threshold));
        tied += __popc(__ballot_sync(~0u, own < count && bin == threshold));
    }
    return above | tied << 16;
}

// Where a warp's next token goes, and how many it may still take of those at the threshold.
struct Progress {
    uint32_t place, ties_left;
};

// List a warp's collected tokens that are above the threshold or the first at it.
template <int STEP, typename SlotOf>
__device__ __forceinline__ void put_collected(const List<STEP>& list, SlotOf slot_of, const uint32_t* held,
                                              uint32_t count, uint32_t threshold, Progress& progress) {
    const uint32_t lane = threadIdx.x & 31, below = (1u << lane) - 1;
#pragma unroll 2
    for (uint32_t base = 0; base < count; base += 32) {
        const bool exists = base + lane < count;
        const uint32_t entry = exists ? held[base + lane] : 0, bin = entry >> kOffsetBits;
        const int slot = exists ? slot_of(static_cast<int>(entry & kOffsets)) : 0;
        const uint32_t tied = __ballot_sync(~0u, exists && bin == threshold);
        const bool first_tied = bin == threshold && __popc(tied & below) < progress.ties_left;
        const bool taken = exists && (bin > threshold || first_tied);
        const uint32_t all = __ballot_sync(~0u, taken);
        if (taken) list.put(progress.place + __popc(all & below), slot);
        progress.place += __popc(all);
        progress.ties_left -= min(progress.ties_left, __popc(tied));
    }
}

// The samples of a row that are candidates, or as many of them as are enough, spread over all threads.
struct Samples {
    static constexpr int kOwn = kMostSamples / kThreads;
    int exist, taken;
    uint32_t bin[kOwn];

    __device__ __forceinline__ Samples(const Arguments& a, int64_t index, int first, int last) {
        const int from = (first + kSampleTokens - 1) / kSampleTokens;
        const uint16_t* keys = a.sample_key + index * (a.key_stride / kSampleTokens) + from;
        exist = last / kSampleTokens - from;
        taken = min(exist, kMostSamples);
        const float step = static_cast<float>(exist) / taken;
#pragma unroll
        for (int i = 0; i < kOwn; i++) {
            bin[i] = has(i) ? bin_of(__ldg(keys + static_cast<int>(number(i) * step))) / (kBins / kSampleBins) : 0;
        }
    }
    __device__ __forceinline__ bool enough() const { return exist >= kLeastSamples; }
    __device__ __forceinline__ bool has(int i) const { return number(i) < taken; }

  private:
    __device__ __forceinline__ int number(int i) const { return i * kThreads + static_cast<int>(threadIdx.x); }
};

// A bin that very likely holds, with all above it, at least the budget of a row's keys, and not many more.  All threads
// must call it; the histogram is zero before and after.
__device__ inline uint32_t sample_bound(const Samples& samples, uint32_t among, uint32_t budget, uint32_t* count,
                                        Shared& shared) {
#pragma unroll
    for (int i = 0; i < Samples::kOwn; i++) {
        if (samples.has(i)) atomicAdd(&count[samples.bin[i]], 1u);
    }
    __syncthreads();
    sum_bins(shared, count, kSampleBins, 1, 0);
    __syncthreads();
    // Four standard deviations more than the budget's share of the sample.
    const float share = static_cast<float>(budget) / among * samples.taken;
    const uint32_t wanted = static_cast<uint32_t>(share + 4.f * sqrtf(share)) + 4;
    if (threadIdx.x < 32) {
        const Found found = find_own(shared, count, wanted);
        if (threadIdx.x == 0) shared.found = found;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Samples::kOwn; i++) count[samples.bin[i]] = 0;
    return shared.found.enclosed ? shared.found.bin * (kBins / kSampleBins) : 0;
}

// List the slots of head `index` of all items' selecting heads, this block its part of them.  All blocks of the cluster
// must call it.
template <int STEP>
__device__ inline void select_slots(const Arguments& a, const Choice& choice, const List<STEP>& list,
                                    const FixedTokens& fixed, int64_t index, Shared& shared) {
    const int blocks = gridDim.x, block = blockIdx.x, first = choice.first, last = choice.last;
    const uint32_t budget = choice.budget, among = last - first;
    if (budget == 0) {
        arrive_at_cluster();
        wait_for_cluster();
        fixed.put(list);
        return;
    }
    const Samples samples(a, index, first, last);  // asked for before the keys
    __syncthreads();                               // the histogram is zero

    const uint16_t* row = a.score_key + index * a.key_stride;
    const int first_vector = first / 8, last_vector = (last + 7) / 8, warp = threadIdx.x >> 5;
    const int share = ((last_vector - first_vector + blocks - 1) / blocks + kWarps - 1) / kWarps;  // a warp's
    Part part{reinterpret_cast<const uint4*>(row), 0, 0, 0, first, last};
    part.origin = min(last_vector, first_vector + block * share * kWarps);
    part.begin = min(last_vector, part.origin + warp * share);
    part.end = min(last_vector, part.begin + share);
    const bool bounded = samples.enough();
    const Room room(shared, bounded, a.select_capacity);
    Stages stages(part, room.ring);
    const Pages pages(a, part, room.ring);
    uint32_t least = bounded ? sample_bound(samples, among, budget, room.count, shared) : 0;
    const bool numbered = share * kWarps * 8 <= 1 << kOffsetBits;
    if (threadIdx.x == 0) shared.incomplete = !numbered;
    __syncthreads();
    arrive_at_cluster();  // sums of the sample are needed no more
    uint32_t collected;
    Found found;
    for (int round = 0;; round++) {
        collected = collect(part, stages, least, true, room);
        if (collected > room.capacity) shared.incomplete = 1;
        if (numbered) pages.copy(list.row, part);
        __syncthreads();
        if (round == 0) wait_for_cluster();
        sum_bins(shared, room.count, room.bins, blocks, block);
        if (blocks == 1) __syncthreads();
        if (threadIdx.x < 32) {
            found = find_threshold(shared, room.count, blocks, block, budget, round);
            if (threadIdx.x == 0) shared.found = found;
        }
        if (round == 0) fixed.put(list);
        __syncthreads();
        found = shared.found;
        const uint32_t beyond = room.bins - 1;  // keys that are not told apart
        const bool above = found.enclosed && found.bin == beyond, below = !found.enclosed && least > 0;
        if (round == kMostRounds || !bounded || (!above && !below)) break;
        // The sample misled: the same with a bound such that the last bin begins, or ends, where the present ones do.
        least = above ? least + beyond : least > beyond ? least - beyond : 0;
        if (threadIdx.x == 0) {
            Channel(shared.arrived[kSums], blocks).expect(blocks * sizeof(shared.coarse[0]));
            Channel(shared.arrived[kBinsOfSum], blocks).expect(blocks * sizeof(shared.fine[0]));
        }
        for (int i = threadIdx.x; i < room.bins; i += kThreads) room.count[i] = 0;
        pages.wait();
        stages = Stages(part, room.ring);
        __syncthreads();
    }
    found.bin += least;

    // A warp's part of the list is what it has collected; where that was too much to be held, it collects once more, so
    // many vectors at a time as can be held in any case: first to count, then to list.
    const bool complete = !shared.incomplete;
    const int piece_vectors = complete ? share : static_cast<int>(room.capacity / 8), lane = threadIdx.x & 31;
    Progress progress{0, 0};
    pages.wait();
    uint32_t own_above = 0, own_tied = 0;
    for (int phase = 0; phase < 2; phase++) {
        for (int begin = part.begin; begin < part.end; begin += piece_vectors) {
            Part piece = part;
            if (!complete) {
                piece.origin = piece.begin = begin;
                piece.end = min(part.end, begin + piece_vectors);
                Stages of_piece(piece, room.ring);
                collected = collect(piece, of_piece, found.bin, false, room);
            }
            if (phase == 0) {
                const uint32_t own = count_collected(room.held, collected, found.bin);
                own_above += own & 0xffff;
                own_tied += own >> 16;
            } else {
                const int origin = piece.origin * 8;
                if (complete) {
                    put_collected(
                        list, [&](int offset) { return pages.slot_of(origin + offset); }, room.held, collected,
                        found.bin, progress);
                } else {
                    put_collected(
                        list, [&](int offset) { return list.slot_of(origin + offset); }, room.held, collected,
                        found.bin, progress);
                }
            }
            __syncwarp();
        }
        if (phase == 1) break;
        if (lane == 0) shared.warp_count[0][warp] = own_above, shared.warp_count[1][warp] = own_tied;
        __syncthreads();
        // What comes before: the fixed tokens, other blocks' and other warps'.
        const uint32_t above = __reduce_add_sync(~0u, lane < warp ? shared.warp_count[0][lane] : 0);
        const uint32_t tied = __reduce_add_sync(~0u, lane < warp ? shared.warp_count[1][lane] : 0);
        const uint32_t ties = budget - found.above, ties_before = min(found.ties_before + tied, ties);
        progress = Progress{choice.before + found.above_before + above + ties_before, ties - ties_before};
    }
}

// Select for the head that this block's place in the grid names, unless its item is not sparse; then use(item, index,
// list), `index` being the head's among all items' selecting heads.  The cluster's first block will receive so many
// bytes of results.
template <int STEP, typename Use>
__device__ __forceinline__ void select_head(const Arguments& a, Shared& shared, uint32_t result_bytes, Use use) {
    for (int i = threadIdx.x; i < kZeroed / 4; i += kThreads) {
        reinterpret_cast<uint4*>(shared.pool)[i] = make_uint4(0, 0, 0, 0);
    }
    // Items and page numbers anew: append's are not there yet.
    const Item item = read_item(a, blockIdx.z);
    const int64_t index = static_cast<int64_t>(blockIdx.z) * a.select_heads + blockIdx.y;
    const Choice choice(a, item.length);
    const List<STEP> list(a, shared, item.row, index, choice);
    FixedTokens fixed(choice);
    if (threadIdx.x == 0) {
        const int blocks = gridDim.x;
        Channel(shared.arrived[kSums], blocks).prepare(blocks * sizeof(shared.coarse[0]));
        Channel(shared.arrived[kBinsOfSum], blocks).prepare(blocks * sizeof(shared.fine[0]));
        Channel(shared.arrived[kSlots], blocks).prepare(list.own * sizeof(int32_t));
        Channel(shared.arrived[kResults], blocks).prepare(blockIdx.x == 0 ? result_bytes : 0);
    }
    if (item.mode == kItemSparse) fixed.look_up(list);
    wait_for_previous_kernel();
    if (item.mode != kItemSparse) return;
    select_slots(a, choice, list, fixed, index, shared);
    if (blockIdx.x == 0 && threadIdx.x == 0) a.listed[index] = list.listed;
    use(item, index, list);
}

// Keys that the blocks of a head have to collect: what the sample lets through, with some room for warps that get more
// than their share.
inline double expected_keys(const Arguments& a) {
    const double budget = static_cast<double>(a.list_stride) / a.max_length;
    return 1.25 * (budget + 4 * std::sqrt(budget / kMostSamples)) * a.max_length;
}

// Bytes of shared memory that a block needs.
inline size_t shared_bytes(const Arguments& a) {
    return sizeof(Shared) + (a.select_capacity + a.select_attached) * sizeof(uint32_t);
}

// Launch a kernel that begins with select_head: a cluster for each head of each item.
inline cudaError_t launch(void (*kernel)(Arguments), const Arguments& a, cudaStream_t stream) {
    const size_t bytes = shared_bytes(a);
    const cudaError_t status = set_up(kernel, bytes);
    if (status != cudaSuccess) return status;
    Launch launch(dim3(a.select_blocks, a.select_heads, a.items), dim3(kThreads), bytes, stream);
    if (a.select_blocks > 1) launch.cluster(a.select_blocks);
    return launch.overlapped(a.overlapped)(kernel, a);
}

}  // namespace select
}  // namespace socket_trt

#endif  // SOCKET_TRT_SELECT_CUH_
