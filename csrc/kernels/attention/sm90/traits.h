// Shapes and shared memory of the wgmma attention kernel.
#pragma once

#include <cstdint>

#include "device/far_rows.h"

namespace condensate::kernels::sm90 {

// The keys of one pipeline step, as the producer hands them to the consumers.
template <int kStepBlocks>
struct Step {
    int block[kStepBlocks];      // past the last block of all keys where there is none
                                 // of a far step, the first pool
    uint8_t full[kStepBlocks];   // every row attends every key
    uint8_t whole[kStepBlocks];  // every row attends every key that it sees
    bool last;                   // of the tile
    // Set with the far field only:
    bool far;         // pooled rows instead of blocks
    bool far_next;    // are the next step's?
    uint8_t sampled;  // block j is bit j: for the estimate of the omitted mass
};

constexpr int kFarWarps = 3;  // of the producer's warpgroup: they make pooled rows

enum NamedBarrier : int {  // 0 is __syncthreads
    kWarpgroupStore = 1,   // + consumer: its rows are in shared memory
    kFarThreads = 3,       // the warps that make pooled rows
};

// Barriers in shared memory. P is the producer's thread, with the bytes that it has the TMA bring;
// C a warp of the consumers; F the warps that make pooled rows.
//
//   barrier         arrive       wait  when it completes
//   q_full          P            C     the tile's queries are there
//   q_empty         all C        P     its last scores are made: q may be overwritten
//   k_full[s]       P            C     keys of a step, and steps[s]; of a far step F arrives, not P
//   k_empty[s]      all C        P     the step's scores are made
//   v_full[s]       P            C     values of a step; of a far step F arrives, not P
//   v_empty[s]      all C        P     they are added up
//   far_loaded_k[i] P            F     premade rows of far step i, and far_stage_k[i]
//   far_loaded_v[i] P            F     the same of values
//   out_free        C, a thread  F     the last tile's output has left: rows can be made there
//                   a warpgroup
//   no_far_step     F            C     F has passed a tile that has none
//
// F is never more than a tile behind: C waits for its rows, or for no_far_step, in every tile.

// Shared memory of the far field.
template <bool kFar, int kSteps, int kRecorded>
struct FarSmem {};
template <int kSteps, int kRecorded>
struct FarSmem<true, kSteps, kRecorded> {
    float far_bias[kFarPools];  // log2 of a pooled row's weight in units of raw scores
    device::WalkSmem<kFarWarps, kRecorded> walk;
    int walked;  // blocks below far_end
    // Where the producer has a far step's rows put.
    uint8_t far_stage_k[kSteps], far_stage_v[kSteps];
    uint64_t out_free;                                    // the last tile's output has left
    uint64_t no_far_step;                                 // nor will there be one in this tile
    uint64_t far_loaded_k[kSteps], far_loaded_v[kSteps];  // premade rows are in their stage
};

// Pooled rows that were made ahead, in the memory of `out`.
template <class T, int kRows, int kDim>
struct MadeRows {
    T row[kRows][2][kDim];  // of keys, of values
    uint8_t pool[kRows];
};

// kConsumers warpgroups of 64 rows and one that feeds them. The far field is a template parameter
// because its warps need registers, which the consumers have to give up; the estimate of the
// omitted mass is one because its code in the loop costs time even where it does not run.
template <class T_, int kDim_, int kConsumers_, int kStepBlocks_, int kCtasPerSm_, bool kFar_,
          bool kEstimates_>
struct AttentionTraits {
    using T = T_;
    static constexpr int kDim = kDim_;  // head_dim
    static constexpr int kConsumers = kConsumers_;
    static constexpr int kStepBlocks = kStepBlocks_;
    static constexpr int kCtasPerSm = kCtasPerSm_;
    static constexpr bool kFar = kFar_;
    static constexpr bool kEstimates = kEstimates_;
    static constexpr int kConsumerWarps = 4 * kConsumers;
    static constexpr int kThreads = 128 * (kConsumers + 1);
    // Registers of a thread: what a CTA is launched with, then what the producer leaves over.
    static constexpr int kLaunchRegisters = 65536 / (kThreads * kCtasPerSm) / 8 * 8;
    static constexpr int kProducerRegisters = kFar ? 56 : 24;
    static constexpr int kSpareRegisters = (kLaunchRegisters - kProducerRegisters) / kConsumers;
    static constexpr int kConsumerRegisters = (kLaunchRegisters + kSpareRegisters) / 8 * 8 < 240
                                                  ? (kLaunchRegisters + kSpareRegisters) / 8 * 8
                                                  : 240;
    static constexpr int kRows = 64 * kConsumers;
    static constexpr int kStepKeys = kStepBlocks * kBlockKeys;
    static constexpr int kKeyStages = 3;  // keys are wanted a step before their values
    static constexpr int kValueStages = 2;
    static constexpr int kPanels = kDim / 64;      // 128-byte column panels
    static constexpr int kNTiles = kStepKeys / 8;  // 8-key score tiles of a step
    static constexpr int kDTiles = kDim / 8;       // 8-channel output tiles

    using Step = sm90::Step<kStepBlocks>;
    static constexpr int kQueryPanelBytes = kRows * 128;
    static constexpr int kKeyPanelBytes = kStepKeys * 128;
    static constexpr int kBlockBytes = kBlockKeys * 128;
    static constexpr int kStageBytes = kPanels * kKeyPanelBytes;  // of K, and of V
    static constexpr int kFarSteps = kFarPools / kStepKeys;       // at most
    static constexpr int kMadeRows = kRows / 2 - 1;

    // Tiles of 64-channel panels, each [row][64] in 128-byte swizzle.
    struct alignas(1024) Tiles {
        T q[kPanels][kRows * 64];
        T out[kPanels][kRows * 64];
        T k[kKeyStages][kPanels][kStepKeys * 64];
        T v[kValueStages][kPanels][kStepKeys * 64];
    };
    // Two small CTAs fill the SM's shared memory.
    static constexpr int kRecorded = kConsumers == 1 ? 22 : 64;
    struct Smem : Tiles, FarSmem<kFar, kFarSteps, kRecorded> {
        Step steps[kKeyStages];
        uint64_t q_full, q_empty;
        uint64_t k_full[kKeyStages], k_empty[kKeyStages];
        uint64_t v_full[kValueStages], v_empty[kValueStages];
    };
    using MadeRows = sm90::MadeRows<T, kMadeRows, kDim>;
    static_assert(sizeof(MadeRows) <= sizeof(T[kRows * kDim]), "rows made ahead fit in `out`");
    static_assert(kFar || !kEstimates, "the estimate is made of the far field's pools");
    static_assert(kPanels >= 1 && kDim % 64 == 0, "head_dim is a whole number of panels");
    static_assert(sizeof(Smem) * kCtasPerSm <= 227 * 1024, "the SM's shared memory");
};

}  // namespace condensate::kernels::sm90
