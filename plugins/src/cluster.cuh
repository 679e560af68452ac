// Clusters: blocks that run together and see each other's shared memory, from compute capability 9.0 on.  Before that a
// block is alone, and these helpers do what one block needs.
#ifndef SOCKET_TRT_CLUSTER_CUH_
#define SOCKET_TRT_CLUSTER_CUH_

#include "device.cuh"

namespace socket_trt {

// No block may look at another's shared memory before all have written it, nor leave while another may still look.
__device__ __forceinline__ void arrive_at_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
    __syncthreads();
#endif
}

#if __CUDA_ARCH__ >= 900
// Address of another block's shared memory, at the place where `here` is in this block's.
__device__ __forceinline__ uint32_t address_in_block(const void* here, int block) {
    uint32_t address = shared_address(here);
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(block));
    return address;
}
#endif
__device__ __forceinline__ uint4 load_of_block(const uint4* words, int block) {
#if __CUDA_ARCH__ >= 900
    uint4 x;
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address_in_block(words, block)));
    return x;
#else
    return *words;
#endif
}
__device__ __forceinline__ void store_to_block(uint32_t* word, int block, uint32_t value) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address_in_block(word, block)), "r"(value) : "memory");
#else
    *word = value;
#endif
}

}  // namespace socket_trt

#endif  // SOCKET_TRT_CLUSTER_CUH_
