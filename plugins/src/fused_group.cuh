// The blocks that decode together in decode_fused.cu: what they share, wait for and work on, and their shared memory.
#ifndef SOCKET_TRT_FUSED_GROUP_CUH_
#define SOCKET_TRT_FUSED_GROUP_CUH_

#include "attend_list.cuh"
#include "key_histogram.cuh"
#include "score_pass.cuh"

namespace socket_trt {
namespace fused {

constexpr int kMostBlocks = 32;  // of a group: a thread for every segment
constexpr int kWarps = 16, kThreads = kWarps * 32;
constexpr int kHeads = 4;
constexpr int kRounds = 3;  // of collecting, each above a lower bound
constexpr int kUnit = Layout<1, 64>::kUnit, kOwnTokens = Layout<1, 64>::kOwnTokens, kPiece = Layout<1, 64>::kQuadTokens;
constexpr int kOffsetBits = 18;  // of a collected key's place in its warp's run of tokens
constexpr uint32_t kOffsets = (1u << kOffsetBits) - 1;

constexpr int kSampleShift = 5;  // bins of the sample's histogram are so much coarser
constexpr int kSampleBins = kBins >> kSampleShift;

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

}  // namespace fused
}  // namespace socket_trt

#endif  // SOCKET_TRT_FUSED_GROUP_CUH_
