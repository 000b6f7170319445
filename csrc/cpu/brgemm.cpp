// The one file between the kernels for AMX and PyTorch's copy of oneDNN.
#if defined(__x86_64__)
#include "brgemm.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>

#include <exception>

namespace lowrank {

void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate, const void* A,
            const void* B, float* C) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, static_cast<const at::BFloat16*>(A),
                              static_cast<const at::BFloat16*>(B), C, /*is_vnni=*/true);
}

bool brgemm_enabled() { return at::globalContext().userEnabledMkldnn(); }

// oneDNN wants bfloat16 in pairs only where it would use the tiles.
bool brgemm_uses_amx() { return at::native::cpublas::could_pack(at::kBFloat16) && brgemm_runs(); }

bool brgemm_runs() {
  constexpr int n = 16;
  alignas(64) at::BFloat16 A[n][2], B[n][2];
  alignas(64) float C[n][n];
  for (int i = 0; i < n; ++i) {
    A[i][0] = static_cast<float>(i);
    A[i][1] = 1.0f;
    B[i][0] = 2.0f;
    B[i][1] = static_cast<float>(i);
  }
  try {
    brgemm(n, n, 2, 2, n, n, false, A, B, C[0]);
    const TileGuard release;
  } catch (const std::exception&) {
    return false;
  }
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j)
      if (C[i][j] != static_cast<float>(2 * i + j)) return false;
  return true;
}

TileGuard::~TileGuard() { at::native::cpublas::brgemm_release(); }

}  // namespace lowrank
#endif  // __x86_64__
