// What one op would launch, without a GPU and without running it: the host code of plan.cuh and routed_plan.cuh, with
// a launch that prints. A program for `lowrank-fast codegen`; compiled by a host compiler like the SIMT harness.
//
//   record_plan OP WAY T D RANK EXPERTS DTYPE WIDE ON_X DROPOUT PROCESSORS SHARED_LIMIT CLUSTERS
//
// OP: residual, dx and dB (that gradient alone), static, batch, token; WAY: forward, backward; DTYPE: 0 float32, 1
// bfloat16, 2 float16; WIDE: float32 factors. A line per launch, by tabs: mangled kernel, name in the plan, grid x y z,
// threads, blocks per cluster, shared bytes, bytes of streamed tiles in flight per block, DRAM bytes (each argument
// once), bytes that are read again. The last two are formulas over the parameters, not measurements.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#define LOWRANK_ARCH plan_only
#include "routed_plan.cuh"

namespace kernels = lowrank::LOWRANK_ARCH;
using lowrank::Factor, lowrank::MutableFactor, lowrank::Rows;

namespace {

int element_size = 2;
struct InFlight {
  size_t bytes, expand;  // (stages - 1) streamed tiles; of phase 2 alone, for a row kernel
};
std::map<const void*, InFlight> in_flight;  // by kernel

template <class E, int R>
void tiles_of_rank() {
  using namespace kernels;
  const auto row = [](auto m) {
    constexpr int block_m = decltype(m)::value;
    using C = RowTuning<E, R, block_m>;
    constexpr size_t column = (C::stages - 1) * block_m * sizeof(E);
    in_flight[reinterpret_cast<void*>(row_kernel<E, R, block_m>)] = {column * C::block_k, column * C::block_n};
  };
  row(Int<16>{});
  row(Int<large_block_m<E, R>()>{});
  using G = ColumnTuning<E, R, kRows>;
  using X = ColumnTuning<E, R, kOut>;
  in_flight[reinterpret_cast<void*>(column_kernel<E, R, kRows>)] = {(G::stages - 1) * G::x_bytes, 0};
  using H = ColumnTuning<E, R, kClusterRows>;
  in_flight[reinterpret_cast<void*>(column_kernel<E, R, kClusterRows>)] = {(H::stages - 1) * H::x_bytes, 0};
  in_flight[reinterpret_cast<void*>(column_kernel<E, R, kOut>)] = {(X::stages - 1) * X::x_bytes, 0};
  if constexpr (R <= 32) {
    using C = ClusterTuning<E, R>;
    in_flight[reinterpret_cast<void*>(cluster_backward_kernel<E, R>)] = {(C::stages - 1) * 2 * C::x_bytes, 0};
  }
}
template <class E>
void tiles_of_element() {
  tiles_of_rank<E, 16>();
  tiles_of_rank<E, 32>();
  tiles_of_rank<E, 64>();
  tiles_of_rank<E, 128>();
}

// ------------------------------------------------------------------------------------------------ bytes

struct Bytes {
  double once = 0, again = 0;
};
double elements(double rows, double columns, int size) { return rows * columns * size; }
int size_of(const Factor& f) { return f.wide ? 4 : element_size; }
int size_of(const MutableFactor& f) { return f.wide ? 4 : element_size; }

Bytes bytes_of(const kernels::RowParams& p, const simt::Launch& l) {
  Bytes b;
  const double T = double(p.segment_rows) * l.grid.z, blocks = double(l.grid.x) * l.grid.z;
  if (p.x) {
    const double x = elements(T, p.d_in, element_size), A = elements(p.rank, p.d_in, size_of(p.A));
    b.once += x + A;
    b.again += (blocks * l.grid.y - 1) * A + (l.grid.y - 1) * x;
  } else {
    b.once += elements(T, p.t_rank + (p.w_in ? p.rank / p.t_rank : 0), 4);
  }
  if (p.out) {
    const double B = elements(p.rank, p.d_out, size_of(p.B)) * (p.B_segment_stride ? l.grid.z : 1);
    b.once += elements(T, p.d_out, element_size) * (p.y ? 2 : 1) + B;
    b.again += (l.grid.x - 1) * B;
  }
  if (p.t_out) b.once += elements(T, p.A_split < p.rank ? p.A_split : p.rank, 4);
  if (p.upper_out) b.once += elements(T, p.rank - p.A_split, 4);
  return b;
}
Bytes bytes_of(const kernels::ColumnParams& p, const simt::Launch& l) {
  Bytes b;
  const double T = double(p.tokens);
  if (p.grad || p.row_sums) b.once += elements(T, p.cols, element_size);
  if (p.grad || p.out) {
    const double z = elements(T, p.z_weights ? p.z_rank + p.rank / p.z_rank : p.rank, 4);
    b.once += z;
    b.again += (l.grid.x - 1) * z;
  }
  if (p.row_sums || p.out) {
    const double W = elements(p.rank, p.cols, size_of(p.W)) * (p.W_segment_stride ? l.grid.z : 1);
    b.once += W;
    b.again += (l.grid.y - 1) * W;
  }
  if (p.grad) b.once += elements(double(l.grid.y) * l.grid.z * p.cols, p.rank, 4);
  if (p.row_sums) b.once += elements(l.grid.x / l.cluster * T, p.rank, 4);
  if (p.out) b.once += elements(T, p.cols, element_size) * (p.accumulate ? 2 : 1);
  return b;
}
Bytes bytes_of(const kernels::ClusterParams& p, const simt::Launch& l) {
  const double T = double(p.tokens), clusters = l.grid.x / l.cluster;
  const double factors = elements(p.rank, p.d_in, size_of(p.A)) + elements(p.rank, p.d_out, size_of(p.B));
  return {elements(T, 2 * p.d_in + p.d_out, element_size) + elements(T, p.rank, 4) + factors +
              elements(clusters * (p.d_in + p.d_out), p.rank, 4),
          (clusters - 1) * factors};
}
Bytes bytes_of(const kernels::SumParams& p, const simt::Launch&) {
  return {elements(p.outputs, p.elements, 4) * p.count +
          elements(p.outputs, p.elements, p.sums ? 4 : size_of(p.target))};
}
Bytes bytes_of(const kernels::SoftmaxParams& p, const simt::Launch& l) {
  const double T = double(p.segment_rows) * l.grid.y;
  return {(p.t ? elements(T, p.rank, 4) : elements(T, p.experts, 4)) + elements(T, p.experts, 4)};
}
Bytes bytes_of(const kernels::MixParams& p, const simt::Launch& l) {
  const double mix = elements(p.d_out, p.rank, 4) * l.grid.y, B = elements(p.d_out * p.rank, p.experts, size_of(p.B));
  return {B + mix, (l.grid.y - 1) * B};
}
Bytes weight_gradient_bytes(const kernels::BankParams& p) {
  const double G = elements(p.d_out, p.rank, 4) * p.segments, B = elements(p.d_out * p.rank, p.experts, size_of(p.B));
  return {G + B, (p.experts - 1) * G + (p.segments - 1) * B};
}
Bytes bank_gradient_bytes(const kernels::BankParams& p) {
  const double G = elements(p.d_out, p.rank, 4) * p.segments;
  return {G + elements(p.d_out * p.rank, p.experts, size_of(p.dB)), (p.experts - 1) * G};
}
Bytes bytes_of(const kernels::RouteBackwardParams& p, const simt::Launch&) {
  const int width = p.rank * (p.token_routing ? p.experts + 1 : 1);  // dz and t, or u
  return {elements(double(p.tokens), width + 2 * p.experts + (p.dt ? p.rank : 0), 4)};
}
Bytes bytes_of(const kernels::RouterGradientParams& p, const simt::Launch& l) {
  return {elements(double(p.tokens), p.experts + p.rank, 4) + elements(l.grid.x * p.experts, p.rank, 4)};
}

Bytes bytes_of_kernel(const std::string& symbol, const void* params, const simt::Launch& l) {
  const auto is = [&](const char* name) { return symbol.find(name) != std::string::npos; };
#define LOWRANK_BYTES(kernel, Params) \
  if (is(kernel)) return bytes_of(*static_cast<const kernels::Params*>(params), l)
  LOWRANK_BYTES("10row_kernel", RowParams);
  LOWRANK_BYTES("13column_kernel", ColumnParams);
  LOWRANK_BYTES("23cluster_backward_kernel", ClusterParams);
  LOWRANK_BYTES("10sum_kernel", SumParams);
  LOWRANK_BYTES("14softmax_kernel", SoftmaxParams);
  LOWRANK_BYTES("10mix_kernel", MixParams);
  LOWRANK_BYTES("21route_backward_kernel", RouteBackwardParams);
  LOWRANK_BYTES("22router_gradient_kernel", RouterGradientParams);
#undef LOWRANK_BYTES
  const auto& bank = *static_cast<const kernels::BankParams*>(params);
  if (is("22weight_gradient_kernel")) return weight_gradient_bytes(bank);
  if (is("20bank_gradient_kernel")) return bank_gradient_bytes(bank);
  if (is("12count_kernel")) return {};  // reads a mask, if there is one
  std::fprintf(stderr, "record_plan: no formula for %s\n", symbol.c_str());
  std::exit(1);
}

}  // namespace

// ------------------------------------------------------------------------------------------------ the launch that
// prints

namespace simt {

void launch(const Launch& l, void (*)(void*), void* closure, size_t) {
  Dl_info info;
  if (!dladdr(l.kernel, &info) || !info.dli_sname) std::abort();
  const void* params = static_cast<char*>(closure) + sizeof(void*);  // {kernel, params}, see simt.cuh
  const Bytes bytes = bytes_of_kernel(info.dli_sname, params, l);
  const bool expands = in_flight[l.kernel].expand && !static_cast<const kernels::RowParams*>(params)->x;
  const size_t streamed = expands ? in_flight[l.kernel].expand : in_flight[l.kernel].bytes;
  std::printf("%s\t%s\t%d\t%d\t%d\t%d\t%d\t%zu\t%zu\t%.0f\t%.0f\n", info.dli_sname, l.name, l.grid.x, l.grid.y,
              l.grid.z, l.threads, l.cluster, l.shared_bytes, streamed, bytes.once, bytes.again);
}
void workspace(void*, size_t) {}

// Kernels are compiled and never run.
int thread_index() { std::abort(); }
int block_rank() { std::abort(); }
Grid block_index() { std::abort(); }
Grid grid_size() { std::abort(); }
void* shared_memory() { std::abort(); }
void sync_block(Site) { std::abort(); }
void sync_warp(Site) { std::abort(); }
void sync_cluster(Site) { std::abort(); }
uint32_t shuffle(uint32_t, int, Site) { std::abort(); }
void ldmatrix(uint32_t*, const void*, int, bool, Site) { std::abort(); }
void mma_16816(float*, const uint32_t*, const uint32_t*, MmaType, Site) { std::abort(); }
void cp_async(void*, const void*, int, Site) { std::abort(); }
void cp_async_commit() { std::abort(); }
void cp_async_wait(int) { std::abort(); }
void load16(void*, const void*, Site) { std::abort(); }
void store16(void*, const void*, Site) { std::abort(); }
void* map_shared(const void*, int) { std::abort(); }

}  // namespace simt

int main(int count, char** values) {
  if (count != 14) return 2;
  const std::string op = values[1];
  const bool forward = !std::strcmp(values[2], "forward");
  const auto number = [&](int i) { return std::atoll(values[i]); };
  const int64_t T = number(3);
  const int d = static_cast<int>(number(4)), rank = static_cast<int>(number(5)), experts = static_cast<int>(number(6));
  const int dtype = static_cast<int>(number(7)), wide = static_cast<int>(number(8));
  const bool on_x = number(9), dropout = number(10);
  kernels::host_processors = static_cast<int>(number(11));
  kernels::host_shared_limit = static_cast<size_t>(number(12));
  kernels::use_clusters = number(13);
  element_size = dtype == lowrank::kF32 ? 4 : 2;
  tiles_of_element<float>();
  tiles_of_element<kernels::Bf16>();
  tiles_of_element<kernels::F16>();

  char* const somewhere = reinterpret_cast<char*>(uintptr_t(1) << 30);  // aligned, never read
  float* const floats = reinterpret_cast<float*>(somewhere);
  const Rows rows = {somewhere, d};
  const int is_wide = wide && dtype != lowrank::kF32;
  const Factor A = {somewhere, d, 1, 0, 1 << 30, is_wide}, B = {somewhere, 1, rank, 0, 1 << 30, is_wide};
  const MutableFactor dA = {somewhere, d, 1, 0, 1 << 30, is_wide}, dB = {somewhere, 1, rank, 0, 1 << 30, is_wide};
  const lowrank::Dropout drop = {dropout ? reinterpret_cast<int64_t*>(somewhere) : nullptr, 1u << 29, 1.125f};
  int error = 0;
  if (op == "residual" || op == "dx" || op == "dB") {
    if (forward) {
      kernels::forward({T, dtype, d, d, rank, 0.5f, rows, rows, rows, A, B, nullptr, floats, drop}, somewhere, nullptr,
                       &error);
    } else {
      const bool all = op == "residual";
      kernels::backward({T, dtype, d, d, rank, 0.5f, rows, all ? rows : Rows{}, op == "dB" ? Rows{} : rows, floats,
                         nullptr, nullptr, A, B, all ? dA : MutableFactor{}, op == "dx" ? MutableFactor{} : dB, drop},
                        somewhere, nullptr, &error);
    }
    return error;
  }
  lowrank::RoutedArgs a = {};
  a.tokens = T;
  a.segments = 1;
  a.dtype = dtype;
  a.d_in = a.d_out = d;
  a.rank = rank;
  a.experts = experts;
  a.routing = op == "batch" ? lowrank::kBatch : op == "token" ? lowrank::kToken : lowrank::kStatic;
  a.router_on_x = on_x;
  a.scale = 0.5f;
  a.x = a.y = a.out = a.g = a.dx = rows;
  a.A = A;
  a.B = {somewhere, 1, rank, int64_t(d) * rank, rank, is_wide};
  a.dA = dA;
  a.dB = {somewhere, 1, rank, int64_t(d) * rank, rank, is_wide};
  a.dropout = drop;
  a.t = a.t_out = floats;
  a.w = a.w_out = floats;
  if (a.routing == lowrank::kStatic) {
    a.weights = a.dweights = floats;
  } else {
    const int width = on_x ? d : rank;
    a.R = {somewhere, 1, width, 0, 1 << 30, is_wide};
    a.dR = {somewhere, 1, width, 0, 1 << 30, is_wide};
    a.p = a.p_out = floats;
  }
  (forward ? kernels::routed_forward : kernels::routed_backward)(a, somewhere, nullptr, &error);
  return error;
}
