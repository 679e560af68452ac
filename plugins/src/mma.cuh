// The matrix instructions that the kernels use, and the layout of their operands.
//
// A warp's lane is (row = lane / 4, quad = lane % 4).  Of a product [16, K] x [K, 8], lane (g, t) holds rows g and g +
// 8 of the left operand, column g of the right one, and columns 2 t and 2 t + 1 of rows g and g + 8 of the result.
#ifndef SOCKET_TRT_MMA_CUH_
#define SOCKET_TRT_MMA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace socket_trt {

// result += left [16, 32] x right [32, 8] in bytes.  left[0], left[1]: rows g and g + 8, columns 4 t to 4 t + 3;
// left[2], left[3]: the same rows, columns 16 further; right[0], right[1]: rows 4 t to 4 t + 3, and 16 further.
__device__ __forceinline__ void multiply_bytes(int32_t (&result)[4], const uint32_t (&left)[4],
                                               const uint32_t (&right)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(result[0]), "+r"(result[1]), "+r"(result[2]), "+r"(result[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

// result += left [16, 16] x right [16, 8] in T.  left[0], left[1]: rows g and g + 8, columns 2 t and 2 t + 1; left[2],
// left[3]: 8 columns further; right[0], right[1]: rows 2 t and 2 t + 1, and 8 further.
template <typename T>
__device__ __forceinline__ void multiply(float (&result)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]);

template <>
__device__ __forceinline__ void multiply<__half>(float (&result)[4], const uint32_t (&left)[4],
                                                 const uint32_t (&right)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(result[0]), "+f"(result[1]), "+f"(result[2]), "+f"(result[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&result)[4], const uint32_t (&left)[4],
                                                        const uint32_t (&right)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(result[0]), "+f"(result[1]), "+f"(result[2]), "+f"(result[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

}  // namespace socket_trt

#endif  // SOCKET_TRT_MMA_CUH_
