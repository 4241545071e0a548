// Marks functions that the CPU kernels and the CUDA kernels share.
#pragma once

#ifdef __CUDACC__
#define FASTMIM_INLINE __host__ __device__ __forceinline__
#else
#define FASTMIM_INLINE inline __attribute__((always_inline))
#endif
