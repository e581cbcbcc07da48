// y[M, N] = x[M, K] W[N, K]^T * scale + bias for a batch of 9 to 128 rows on Hopper: each int4 or int8 weight is read once,
// widened to fp16 in registers and fed to wgmma from there, with the batch as the narrow side.
//
// A block owns 64 * GROUPS * TALL output rows and the whole batch. K is shared by K_GROUPS sets of GROUPS warpgroups in it,
// and by a cluster of SPLIT blocks; sums are added up through (distributed) shared memory, in a fixed order. Activations
// go through a ring of stages of 64 k for each set, which the copy engine fills: written by the threads themselves, each
// stage would need a fence that also waits for the weights on their way. Warpgroups do not wait for each other, only for
// full and free stages, so that one widens weights while another multiplies.
//
// Given at compile time: N, K, FORMAT, BATCH, GROUPS, K_GROUPS, TALL, SPLIT, PREFETCH, STAGES, MIN_BLOCKS, BIAS, GELU.
#include "device.cuh"
#include "wgmma.cuh"

enum { INT4, INT8 };

constexpr int SET_WARPS = GROUPS * 4;
constexpr int THREADS = K_GROUPS * SET_WARPS * WARP;
constexpr int CHUNK = 64;
constexpr int CHUNKS = K / CHUNK;
constexpr int STEPS = CHUNKS / (SPLIT * K_GROUPS);  // of one set
constexpr int TILES = N / 16;
constexpr int ROWS = GROUPS * TALL * 64;
constexpr int VECTORS = FORMAT == INT4 ? 1 : 2;
constexpr int STAGE_BYTES = (BATCH * 128 + 1023) / 1024 * 1024;
// A stage is filled anew some steps after its last reader, so that the copy engine rarely waits for a slow warpgroup.
constexpr int AHEAD = STAGES > 4 ? STAGES - 3 : STAGES - 2;
constexpr int PITCH = ROWS + 4;

static_assert(CHUNKS % (SPLIT * K_GROUPS) == 0 && STEPS % 2 == 0 && N % 16 == 0);

DEVICE u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

DEVICE void weight_fragment(const uint4 (&w)[VECTORS], int s, u32 (&a)[4]) {
    if constexpr (FORMAT == INT4) {
        dequantize_int4(word(w[0], s), a);
    } else {
        dequantize_int8(word(w[s / 2], s % 2 * 2), a[0], a[1]);
        dequantize_int8(word(w[s / 2], s % 2 * 2 + 1), a[2], a[3]);
    }
}

struct alignas(64) TensorMap {
    u64 words[16];
};

DEVICE void barrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

DEVICE void barrier_arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory"); }

// The copy engine fills a stage with 64 k of all rows from `column` on, swizzled, and then completes the barrier's phase.
DEVICE void fetch_tile(const TensorMap& map, u32 stage, u32 barrier, int column) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(BATCH * 128) : "memory");
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
                     "r"(stage), "l"(&map), "r"(column), "r"(0), "r"(barrier)
                 : "memory");
}

DEVICE void barrier_wait(u32 barrier, int phase) {
    asm volatile("{ .reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
                 "@!done bra again; }" ::"r"(barrier), "r"(phase)
                 : "memory");
}

DEVICE void cluster_sync() {
    if constexpr (SPLIT == 1) {
        __syncthreads();
    } else {
        asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
    }
}

// No block may leave while another still reads its sums; nothing has to become visible.
DEVICE void cluster_leave() {
    if constexpr (SPLIT > 1)
        asm volatile("barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}

DEVICE float4 load_from_block(u32 shared, int rank) {
    float4 v;
    if constexpr (SPLIT == 1) {
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(shared) : "memory");
    } else {
        asm volatile("{ .reg .u32 a; mapa.shared::cluster.u32 a, %4, %5; ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [a]; }"
                     : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(shared), "r"(rank) : "memory");
    }
    return v;
}

extern "C" __global__ void __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(THREADS, MIN_BLOCKS)
linear(const __grid_constant__ TensorMap x, const u8* __restrict__ weights, const float* __restrict__ scales,
       const u16* __restrict__ bias, u16* y, int num_rows) {
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ u64 filled[K_GROUPS][STAGES], freed[K_GROUPS][STAGES];
    const int lane = threadIdx.x % WARP;
    // From lane 0, which tells the compiler that it is the same in all lanes: wgmma's descriptors are then made without
    // moving them from lane to lane.
    const int block_warp = __shfl_sync(0xffffffffu, threadIdx.x / WARP, 0);
    const int set = block_warp / SET_WARPS, warp = block_warp % SET_WARPS;
    const bool is_producer = threadIdx.x % (SET_WARPS * WARP) == 0;
    // The sets take turns, so that what a block reads at a time lies together.
    const int first_chunk = blockIdx.x * (STEPS * K_GROUPS) + set;
    const int first_tile = blockIdx.y * (ROWS / 16) + warp / 4 * TALL * 4 + warp % 4;

    uint4 buffer[PREFETCH][TALL][VECTORS];
    const auto fetch_weights = [&](int step, uint4 (&out)[TALL][VECTORS]) {
#pragma unroll
        for (int m = 0; m < TALL; m++) {
            const int tile = min(first_tile + m * 4, TILES - 1);
            const u8* source = weights + (((i64)tile * CHUNKS + first_chunk + step * K_GROUPS) * VECTORS * WARP + lane) * 16;
#pragma unroll
            for (int v = 0; v < VECTORS; v++) out[m][v] = load_streaming(source + v * WARP * 16);
        }
    };
#pragma unroll
    for (int p = 0; p < PREFETCH; p++) {
        if (p < STEPS) fetch_weights(p, buffer[p]);
    }

    const u32 ring = shared_address(shared) + set * STAGES * STAGE_BYTES;
    const u32 full_barriers = shared_address(filled[set]), free_barriers = shared_address(freed[set]);
    const auto fetch_batch = [&](int step) {
        if (step < STEPS && is_producer) {
            const int slot = step % STAGES;
            if (step >= STAGES) barrier_wait(free_barriers + slot * 8, step / STAGES - 1 & 1);
            fetch_tile(x, ring + slot * STAGE_BYTES, full_barriers + slot * 8, (first_chunk + step * K_GROUPS) * CHUNK);
        }
    };
    if (is_producer) {
#pragma unroll
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full_barriers + s * 8, 1);
            barrier_init(free_barriers + s * 8, SET_WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    allow_next_kernel();
    wait_for_previous_kernel();
#pragma unroll
    for (int s = 0; s < AHEAD; s++) fetch_batch(s);
    __syncthreads();  // the barriers are there

    float sums[TALL][BATCH / 2] = {};
    u32 a[2][TALL][2][4];
    for (int base = 0; base < STEPS; base += PREFETCH) {
#pragma unroll
        for (int p = 0; p < PREFETCH; p++) {
            const int step = base + p;
            if (STEPS % PREFETCH != 0 && step >= STEPS) break;
            fetch_batch(step + AHEAD);
            __syncwarp();
            barrier_wait(full_barriers + step % STAGES * 8, step / STAGES & 1);
            const u32 stage = ring + step % STAGES * STAGE_BYTES;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                wgmma_wait<1>();
                // Of this warp's products all but those of this step have ended, and so have their reads.
                if (half == 1 && step > 0 && lane == 0) barrier_arrive(free_barriers + (step - 1) % STAGES * 8);
#pragma unroll
                for (int m = 0; m < TALL; m++)
#pragma unroll
                    for (int s = 0; s < 2; s++) weight_fragment(buffer[p][m], half * 2 + s, a[half][m][s]);
                wgmma_fence();
#pragma unroll
                for (int s = 0; s < 2; s++)
#pragma unroll
                    for (int m = 0; m < TALL; m++)
                        wgmma(sums[m], a[half][m][s], matrix_descriptor(stage + (half * 2 + s) * 32));
                wgmma_commit();
            }
            if (step + PREFETCH < STEPS) fetch_weights(step + PREFETCH, buffer[p]);
        }
    }
    wgmma_wait<0>();
    __syncthreads();

    // Sums as [batch row][output row], then each block of the cluster adds up and writes every SPLIT-th batch row.
    float* partial = reinterpret_cast<float*>(shared) + set * BATCH * PITCH;
    const u32 partials = shared_address(shared);
#pragma unroll
    for (int m = 0; m < TALL; m++) {
        const int row = (warp / 4 * TALL + m) * 64 + warp % 4 * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < BATCH / 2; i++) {
            const int batch_row = i / 4 * 8 + lane % 4 * 2 + i % 2;
            partial[batch_row * PITCH + row + i % 4 / 2 * 8] = sums[m][i];
        }
    }
    cluster_sync();
    for (int index = threadIdx.x; index < BATCH / SPLIT * (ROWS / 4) + (BATCH % SPLIT ? ROWS / 4 : 0); index += THREADS) {
        const int batch_row = index / (ROWS / 4) * SPLIT + (int)blockIdx.x;
        const int row = index % (ROWS / 4) * 4;
        const int out_row = (int)blockIdx.y * ROWS + row;
        if (batch_row >= num_rows || out_row >= N) continue;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int rank = 0; rank < SPLIT; rank++) {
#pragma unroll
            for (int k_group = 0; k_group < K_GROUPS; k_group++) {
                const float4 part = load_from_block(partials + ((k_group * BATCH + batch_row) * PITCH + row) * 4, rank);
                sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
            }
        }
        const float4 scale = *reinterpret_cast<const float4*>(scales + out_row);
        sum.x *= scale.x, sum.y *= scale.y, sum.z *= scale.z, sum.w *= scale.w;
        if (BIAS) {
            const uint2 b = *reinterpret_cast<const uint2*>(bias + out_row);
            const float2 low = to_float2(b.x), high = to_float2(b.y);
            sum.x += low.x, sum.y += low.y, sum.z += high.x, sum.w += high.y;
        }
        if (GELU) sum.x = gelu_tanh(sum.x), sum.y = gelu_tanh(sum.y), sum.z = gelu_tanh(sum.z), sum.w = gelu_tanh(sum.w);
        *reinterpret_cast<uint2*>(y + (i64)batch_row * N + out_row) =
            make_uint2(to_half2(sum.x, sum.y), to_half2(sum.z, sum.w));
    }
    cluster_leave();
}
