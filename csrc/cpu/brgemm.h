// The matrix product of oneDNN that PyTorch links (at::native::cpublas::brgemm), free of its headers.
#pragma once

#include <cstdint>

namespace lowrank {

// C [m][n] (+)= A [m][k] B, in float32. A and B are bfloat16; B holds pairs along k: [k / 2][ldb][2], k even. oneDNN
// compiles a kernel for every new tuple of sizes and strides (50 us, kept per thread), so callers keep these few.
// Throws where it does not run.
void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate, const void* A,
            const void* B, float* C);

bool brgemm_enabled();   // oneDNN is not switched off (torch.backends.mkldnn)
bool brgemm_uses_amx();  // it runs bfloat16 on the AMX tiles of this CPU
bool brgemm_runs();      // it runs at all: on the tiles or on AVX-512; tries a small product

// Gives the tile registers back when a kernel returns: whatever oneDNN runs next on the thread sets up its own.
struct TileGuard {
  TileGuard() = default;
  TileGuard(const TileGuard&) = delete;
  ~TileGuard();
};

}  // namespace lowrank
