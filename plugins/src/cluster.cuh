// Clusters: blocks that run together and send words to each other's shared memory, from compute capability 9.0 on.
// Before that a block is alone, and what is here does what one block needs.
//
// Words are sent by asynchronous stores that count what has arrived (st.async).  Plain stores and barriers of the
// cluster do the same, but then every thread has to wait for a fence of the whole GPU, about half a microsecond.
#ifndef SOCKET_TRT_CLUSTER_CUH_
#define SOCKET_TRT_CLUSTER_CUH_

#include "device.cuh"

namespace socket_trt {

// Blocks may send only after all of the cluster have arrived, with their channels prepared.  All threads must call
// both.
__device__ __forceinline__ void arrive_at_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;\nbarrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
}

// What a block receives for one purpose, again and again: so many bytes from all blocks of its cluster, itself
// included.
class Channel {
  public:
    __device__ __forceinline__ Channel(uint64_t& barrier, int blocks)
        : barrier_(shared_address(&barrier)), alone_(blocks == 1) {}

    // Once, by one thread, before it arrives at the cluster: what this block will receive first.
    __device__ __forceinline__ void prepare(uint32_t bytes) const {
#if __CUDA_ARCH__ >= 900
        asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier_) : "memory");
        expect(bytes);
#endif
    }
    // By one thread, when it has waited: what this block will receive next.  (Where nothing is sent a second call would
    // be one arrival too many.)
    __device__ __forceinline__ void expect(uint32_t bytes) const {
#if __CUDA_ARCH__ >= 900
        if (alone_) return;
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier_), "r"(bytes) : "memory");
#endif
    }
    // To another block's shared memory, at the place where `to` is in this block's.
    __device__ __forceinline__ void send(uint32_t* to, int block, uint32_t value) const {
#if __CUDA_ARCH__ >= 900
        if (!alone_) {
            asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                             in_block(shared_address(to), block)),
                         "r"(value), "r"(in_block(barrier_, block))
                         : "memory");
            return;
        }
#endif
        *to = value;
    }
    __device__ __forceinline__ void send(uint4* to, int block, const uint4& value) const {
#if __CUDA_ARCH__ >= 900
        if (!alone_) {
            asm volatile(
                "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                    in_block(shared_address(to), block)),
                "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(in_block(barrier_, block))
                : "memory");
            return;
        }
#endif
        *to = value;
    }
    // For the calling thread; `turn` counts what was received before.  A block that is alone needs a barrier instead.
    __device__ __forceinline__ void wait(uint32_t turn) const {
#if __CUDA_ARCH__ >= 900
        if (alone_) return;
        uint32_t done;
        do {
            asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                         : "=r"(done)
                         : "r"(barrier_), "r"(turn & 1)
                         : "memory");
        } while (done == 0);
#endif
    }

  private:
#if __CUDA_ARCH__ >= 900
    static __device__ __forceinline__ uint32_t in_block(uint32_t address, int block) {
        asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(block));
        return address;
    }
#endif

    uint32_t barrier_;
    bool alone_;
};

}  // namespace socket_trt

#endif  // SOCKET_TRT_CLUSTER_CUH_
