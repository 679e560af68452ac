// Asynchronous copies of 16 bytes from global to shared memory; shared addresses are those of its own address space.
#ifndef SOCKET_TRT_ASYNC_COPY_CUH_
#define SOCKET_TRT_ASYNC_COPY_CUH_

#include <cstdint>

namespace socket_trt {

__device__ __forceinline__ void copy_16_bytes(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}
// Copy, or fill with zeros.
__device__ __forceinline__ void copy_or_clear(uint32_t to, const void* from, bool exists) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Wait until no more than the `PENDING` last groups of copies are under way.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace socket_trt

#endif  // SOCKET_TRT_ASYNC_COPY_CUH_
