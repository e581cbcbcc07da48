// y[M, N] = x[M, K] W[N, K]^T * scale + bias, optionally through GELU, for few rows M: each weight is read once.
//
// The weights are operand A of the tensor core (16 output rows x 16 k), the activations operand B (8 batch rows), so that
// a batch of up to 8 costs one instruction. A block owns ROW_TILES * 16 output rows; its SPLIT warps share K and add up
// their sums at the end. Weights go from memory to registers, PREFETCH chunks of 64 k ahead, and start before the
// previous kernel has ended; activations go through a ring in shared memory that each warp owns alone.
//
// Given at compile time: N, K, FORMAT, BATCH_TILES, ROW_TILES, SPLIT, PREFETCH, STAGES, MIN_BLOCKS, BIAS, SCALED, GELU.
#include "device.cuh"

enum { INT4, INT8, E4M3, F16 };

constexpr int CHUNK = 64;
constexpr int CHUNKS = K / CHUNK;
constexpr int STEPS = (CHUNKS + SPLIT - 1) / SPLIT;
constexpr int TILES = N / 16;
constexpr int VECTORS = FORMAT == INT4 ? 1 : FORMAT == F16 ? 4 : 2;  // 16-byte loads a lane for 16 rows x 64 k
constexpr bool FRAGMENTS = FORMAT == INT4 || FORMAT == INT8;         // stored by pack.py in the order of operand A
constexpr int STAGE_BYTES = BATCH_TILES * 8 * CHUNK * 2;
constexpr int REGISTERS = ROW_TILES * BATCH_TILES * 4;

static_assert(K % CHUNK == 0 && N % 16 == 0);
static_assert((STAGES & (STAGES - 1)) == 0);

// Where the 16 bytes `column` of a batch row lie in its 128: chosen so that the reads below meet no bank twice.
DEVICE int swizzle(int row, int column) {
    if constexpr (FRAGMENTS) return column ^ (row & 7);
    if constexpr (FORMAT == F16) return column ^ ((row & 1) * 4);
    return column ^ (row & 1);
}

DEVICE void load_weights(const u8* weights, int tile, int chunk, int lane, uint4 (&out)[VECTORS]) {
    if constexpr (FRAGMENTS) {
        const u8* source = weights + (((i64)tile * CHUNKS + chunk) * VECTORS * WARP + lane) * 16;
#pragma unroll
        for (int v = 0; v < VECTORS; v++) out[v] = load_streaming(source + v * WARP * 16);
    } else {
        constexpr i64 ROW_BYTES = FORMAT == F16 ? (i64)K * 2 : K;
        const u8* source = weights + (tile * 16 + lane / 4) * ROW_BYTES + (lane % 4) * 16;
        if constexpr (FORMAT == F16) {
            source += chunk * 128;
            out[0] = load_streaming(source);
            out[1] = load_streaming(source + 64);
            out[2] = load_streaming(source + 8 * ROW_BYTES);
            out[3] = load_streaming(source + 8 * ROW_BYTES + 64);
        } else {
            source += chunk * 64;
            out[0] = load_streaming(source);
            out[1] = load_streaming(source + 8 * ROW_BYTES);
        }
    }
}

DEVICE u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Operand A of step s (0..3) of a chunk.
DEVICE void weight_fragment(const uint4 (&w)[VECTORS], int s, u32 (&a)[4]) {
    if constexpr (FORMAT == INT4) {
        dequantize_int4(word(w[0], s), a);
    } else if constexpr (FORMAT == INT8) {
        dequantize_int8(word(w[s / 2], s % 2 * 2), a[0], a[1]);
        dequantize_int8(word(w[s / 2], s % 2 * 2 + 1), a[2], a[3]);
#if __CUDA_ARCH__ >= 890
    } else if constexpr (FORMAT == E4M3) {
        dequantize_e4m3(word(w[0], s), a[0], a[2]);
        dequantize_e4m3(word(w[1], s), a[1], a[3]);
#endif
    } else {
        a[0] = word(w[s / 2], s % 2 * 2);
        a[2] = word(w[s / 2], s % 2 * 2 + 1);
        a[1] = word(w[s / 2 + 2], s % 2 * 2);
        a[3] = word(w[s / 2 + 2], s % 2 * 2 + 1);
    }
}

// Operand B of two steps (2 * half, 2 * half + 1) of one batch tile: b0, b1 of the first, b0, b1 of the second.
DEVICE void batch_fragment(u32 stage, int tile, int half, int lane, u32 (&b)[4]) {
    if constexpr (FRAGMENTS) {
        const int row = tile * 8 + lane % 8;
        load_matrix_x4(stage + row * 128 + swizzle(row, half * 4 + lane / 8) * 16, b[0], b[1], b[2], b[3]);
    } else {
        const int row = tile * 8 + lane / 4;
        const int column = FORMAT == F16 ? half * 4 + lane % 4 : lane % 4 * 2 + half;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                     : "r"(stage + row * 128 + swizzle(row, column) * 16)
                     : "memory");
    }
}

extern "C" __global__ void __launch_bounds__(SPLIT * WARP, MIN_BLOCKS)
linear(const u8* __restrict__ weights, const float* __restrict__ scales, const u16* __restrict__ bias, const u16* x,
       u16* y, int num_rows) {
    extern __shared__ __align__(128) u8 shared[];
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const int first_tile = blockIdx.x * ROW_TILES;

    uint4 buffer[PREFETCH][ROW_TILES][VECTORS];
    const auto fetch_weights = [&](int step, uint4 (&out)[ROW_TILES][VECTORS]) {
        const int chunk = warp + step * SPLIT;
        if (chunk < CHUNKS) {
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) load_weights(weights, min(first_tile + r, TILES - 1), chunk, lane, out[r]);
        }
    };
#pragma unroll
    for (int p = 0; p < PREFETCH; p++) {
        if (p < STEPS) fetch_weights(p, buffer[p]);
    }
    allow_next_kernel();
    wait_for_previous_kernel();

    const u32 ring = shared_address(shared) + warp * STAGES * STAGE_BYTES;
    const auto fetch_batch = [&](int step) {
        const int chunk = warp + step * SPLIT;
        if (step < STEPS && chunk < CHUNKS) {
            const u32 stage = ring + (step & (STAGES - 1)) * STAGE_BYTES;
#pragma unroll
            for (int i = 0; i < BATCH_TILES * 2; i++) {
                const int row = i * 4 + lane / 8, column = lane % 8;
                if (row < num_rows)
                    copy_async_16(stage + row * 128 + swizzle(row, column) * 16,
                                  x + (i64)row * K + chunk * CHUNK + column * 8);
            }
        }
        copy_async_commit();
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) fetch_batch(s);

    float sums[ROW_TILES][BATCH_TILES][4] = {};
    for (int base = 0; base < STEPS; base += PREFETCH) {
#pragma unroll
        for (int p = 0; p < PREFETCH; p++) {
            const int step = base + p;
            if (step < STEPS) {
                copy_async_wait<STAGES - 2>();
                __syncwarp();
                fetch_batch(step + STAGES - 1);
                if (warp + step * SPLIT < CHUNKS) {
                    const u32 stage = ring + (step & (STAGES - 1)) * STAGE_BYTES;
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        u32 a[2][ROW_TILES][4];
#pragma unroll
                        for (int r = 0; r < ROW_TILES; r++) {
                            weight_fragment(buffer[p][r], half * 2, a[0][r]);
                            weight_fragment(buffer[p][r], half * 2 + 1, a[1][r]);
                        }
#pragma unroll
                        for (int n = 0; n < BATCH_TILES; n++) {
                            u32 b[4];
                            batch_fragment(stage, n, half, lane, b);
#pragma unroll
                            for (int r = 0; r < ROW_TILES; r++) {
                                mma_16x8x16(sums[r][n], a[0][r], b[0], b[1]);
                                mma_16x8x16(sums[r][n], a[1][r], b[2], b[3]);
                            }
                        }
                    }
                }
                if (step + PREFETCH < STEPS) fetch_weights(step + PREFETCH, buffer[p]);
            }
        }
    }

    // The warps' sums meet in shared memory: [warp][register][lane].
    copy_async_wait<0>();
    __syncthreads();
    float* partial = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int n = 0; n < BATCH_TILES; n++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                partial[(warp * REGISTERS + (r * BATCH_TILES + n) * 4 + c) * WARP + lane] = sums[r][n][c];
    __syncthreads();
    for (int index = warp; index < REGISTERS; index += SPLIT) {
        const int c = index % 4, n = index / 4 % BATCH_TILES, r = index / 4 / BATCH_TILES;
        const int tile = first_tile + r;
        const int batch_row = n * 8 + lane % 4 * 2 + c % 2;
        const int row = tile * 16 + lane / 4 + c / 2 * 8;
        if (batch_row >= num_rows || tile >= TILES) continue;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < SPLIT; w++) sum += partial[(w * REGISTERS + index) * WARP + lane];
        if (SCALED) sum *= scales[row];
        if (BIAS) sum += to_float(bias[row]);
        if (GELU) sum = gelu_tanh(sum);
        y[(i64)batch_row * N + row] = to_half(sum);
    }
}
