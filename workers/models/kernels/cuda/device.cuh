// What every kernel here builds on: PTX that has no C++ spelling, in a form that NVRTC compiles without any header.
// fp16 values travel as bits (u16, or two in a u32); arithmetic is in fp32 unless a name says half2.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE __device__ __forceinline__

constexpr int WARP = 32;

// --- numbers ---------------------------------------------------------------------------------------------------------

DEVICE float to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

DEVICE u16 to_half(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

DEVICE u32 to_half2(float low, float high) {
    u32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

DEVICE float2 to_float2(u32 half2) { return make_float2(to_float((u16)half2), to_float((u16)(half2 >> 16))); }

DEVICE u32 sub_half2(u32 a, u32 b) {
    u32 c;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}

DEVICE u32 fma_half2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

DEVICE float bfloat_to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }

// (a & b) | c in one instruction.
DEVICE u32 and_or(u32 a, u32 b, u32 c) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// tanh form of GELU: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), with tanh(u) = 1 - 2 / (e^2u + 1).
DEVICE float gelu_tanh(float x) {
    const float u = 0.7978845608028654f * x * (1.0f + 0.044715f * x * x);
    const float e = exp2_fast(2.885390081777927f * u);
    return x - __fdividef(x, e + 1.0f);
}

// --- four int4, int8 or e4m3 weights to fp16 ---------------------------------------------------------------------------

// Eight unsigned nibbles (value + 8) in the order that pack.py writes, to four half2.
// A nibble is OR-ed into the mantissa of 1024 (bits 0..3) or of 64 (bits 4..7), and the constant is subtracted: exact.
DEVICE void dequantize_int4(u32 word, u32 (&out)[4]) {
    out[0] = sub_half2(and_or(word, 0x000f000fu, 0x64006400u), 0x64086408u);
    out[1] = sub_half2(and_or(word, 0x00f000f0u, 0x54005400u), 0x54805480u);
    word >>= 8;
    out[2] = sub_half2(and_or(word, 0x000f000fu, 0x64006400u), 0x64086408u);
    out[3] = sub_half2(and_or(word, 0x00f000f0u, 0x54005400u), 0x54805480u);
}

// Four unsigned bytes (value + 128) to two half2: 1024 + byte, minus 1152.
DEVICE void dequantize_int8(u32 word, u32& low, u32& high) {
    low = sub_half2(__byte_perm(word, 0x64646464u, 0x4140), 0x64806480u);
    high = sub_half2(__byte_perm(word, 0x64646464u, 0x4342), 0x64806480u);
}

#if __CUDA_ARCH__ >= 890
DEVICE void dequantize_e4m3(u32 word, u32& low, u32& high) {
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b; }"
        : "=r"(low), "=r"(high) : "r"(word));
}

// Two floats to e4m3, saturating at 448; `low` in the low byte.
DEVICE u16 to_e4m3x2(float low, float high) {
    u16 bits;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(high), "f"(low));
    return bits;
}
#endif

// --- memory ------------------------------------------------------------------------------------------------------------

DEVICE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// Read once and never again: stays out of L1.
DEVICE uint4 load_streaming(const void* pointer) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(pointer));
    return v;
}

DEVICE void copy_async_16(u32 shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

DEVICE void load_matrix_x4(u32 shared, u32& a, u32& b, u32& c, u32& d) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(shared) : "memory");
}

DEVICE void load_matrix_x4_transposed(u32 shared, u32& a, u32& b, u32& c, u32& d) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(shared) : "memory");
}

// --- tensor cores --------------------------------------------------------------------------------------------------------

// D[16 x 8] += A[16 x 16] B[16 x 8]. With g = lane / 4, t = lane % 4: a = (row g, k 2t), (g + 8, 2t), (g, 2t + 8),
// (g + 8, 2t + 8), b = (k 2t, column g), (2t + 8, g), d = (row g, columns 2t, 2t + 1), (g + 8, the same).
DEVICE void mma_16x8x16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// --- programmatic dependent launch ---------------------------------------------------------------------------------------

// The next kernel of the stream may be set up now; it waits in `wait_for_previous_kernel` until this one has finished.
DEVICE void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Nothing written by an earlier kernel may be read, and nothing written at all, before this.
DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// --- reductions ----------------------------------------------------------------------------------------------------------

DEVICE float warp_sum(float value) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

DEVICE float warp_max(float value) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
    return value;
}

// The sum over a block of THREADS threads, the same bits in every thread. `scratch`: THREADS / 32 floats of its own.
template <int THREADS>
DEVICE float block_sum(float value, float* scratch) {
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < THREADS / WARP; i++) total += scratch[i];
    return total;
}

template <int THREADS>
DEVICE float block_max(float value, float* scratch) {
    value = warp_max(value);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    float total = scratch[0];
#pragma unroll
    for (int i = 1; i < THREADS / WARP; i++) total = fmaxf(total, scratch[i]);
    return total;
}
