/* C interface to the kernels for what lies around attention in a decoder, in steps of few tokens: libsocket_trt_kernels
 * has them for whoever wants to call or test them, the plugin library for TensorRT 8.6 as its layers.
 *
 * Such a step reads every weight once and does little else.  On GPUs of compute capability 9.0 and later each kernel
 * begins while the one before it on the stream still runs, and asks for its weights before it waits for that one, so
 * that the memory is not idle between two products.  Hence weights must not be written by what the stream has just been
 * given.
 *
 * All tensors are float16, row-major, contiguous and aligned to 16 bytes; pointers are device pointers, `stream` is a
 * cudaStream_t.  Sums are float32.  Functions return a cudaError_t: cudaErrorInvalidValue for sizes that they do not
 * take. They only enqueue; call SocketTrtPrepareLayers once for each device before a stream is captured.
 */
#ifndef SOCKET_TRT_LAYERS_H_
#define SOCKET_TRT_LAYERS_H_

#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

#define SOCKET_TRT_MOST_PRODUCT_TOKENS 2

SOCKET_TRT_API int32_t SocketTrtPrepareLayers(void);

/* output [tokens, rows] = activations [tokens, columns] times weight [rows, columns] transposed.
 * At most SOCKET_TRT_MOST_PRODUCT_TOKENS tokens: from three on cuBLAS is as fast.  Columns: a multiple of 8. */
SOCKET_TRT_API int32_t SocketTrtProduct(const void* activations, const void* weight, void* output, int32_t tokens,
                                        int32_t rows, int32_t columns, void* stream);

/* normed = input / sqrt(mean(input^2) + epsilon), rounded to float16, times weight; or with plus_one, as Gemma has it,
 * times 1 + weight and rounded then.  input, normed [rows, columns], weight [columns].
 * Columns: a multiple of 8, at most 16,384. */
SOCKET_TRT_API int32_t SocketTrtRmsNorm(const void* input, const void* weight, void* normed, int32_t rows,
                                        int32_t columns, float epsilon, int32_t plus_one, void* stream);

/* sum = residual + branch, in float16, and the norm of it. */
SOCKET_TRT_API int32_t SocketTrtAddRmsNorm(const void* residual, const void* branch, const void* weight, void* sum,
                                           void* normed, int32_t tokens, int32_t columns, float epsilon,
                                           int32_t plus_one, void* stream);

/* Queries, keys and values from joint [tokens, (query_heads + 2 kv_heads) head_size], the former two with their rotary
 * embedding, x cosines + rotate(x) sines, where rotate puts the negated second half of a head in front of its first.
 * cosines, sines [tokens, head_size]; query [query_heads, tokens, head_size], key and value [kv_heads, tokens,
 * head_size].  Head size: a multiple of 16. */
SOCKET_TRT_API int32_t SocketTrtSplitRotary(const void* joint, const void* cosines, const void* sines, void* query,
                                            void* key, void* value, int32_t tokens, int32_t query_heads,
                                            int32_t kv_heads, int32_t head_size, void* stream);

/* output [tokens, columns] = silu(gate) * up, joint [tokens, 2 columns] being the gate and then up.
 * Columns: a multiple of 8. */
SOCKET_TRT_API int32_t SocketTrtSwiGlu(const void* joint, void* output, int32_t tokens, int32_t columns, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* SOCKET_TRT_LAYERS_H_ */
