// Conversions and approximate functions over arrays: raw bytes in on stdin, raw bytes out.
#include <cstdio>
#include <cstdlib>

#include "cases.h"
#include "host/control.h"

namespace bertfast {
namespace host_runtime_test {
namespace {

template<class T>
std::vector<T> read_all() {
  std::vector<T> values;
  T value;
  while (std::fread(&value, sizeof(T), 1, stdin) == 1) values.push_back(value);
  return values;
}

template<class In, class Out, Out (*kConvert)(In)>
void convert(const Arguments&) {
  for (In value : read_all<In>()) {
    Out result = kConvert(value);
    std::fwrite(&result, sizeof(Out), 1, stdout);
  }
}

unsigned short to_half(float value) {
  unsigned short bits = __half_as_ushort(__float2half_rn(value));
  if (__half_as_ushort(__floats2half2_rn(0.0f, value).y) != bits) std::abort();
  return bits;
}
float from_half(unsigned short bits) {
  __half value = __ushort_as_half(bits);
  if (__float_as_uint(__half22float2({value, {0}}).x) != __float_as_uint(__half2float(value))) {
    std::abort();
  }
  return __half2float(value);
}
unsigned short to_bfloat16(float value) {
  unsigned short bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
  if (__bfloat16_as_ushort(__floats2bfloat162_rn(0.0f, value).y) != bits) std::abort();
  return bits;
}
float from_bfloat16(unsigned short bits) {
  return __bfloat162float(__ushort_as_bfloat16(bits));
}

Case to_half_case("to_half", &convert<float, unsigned short, to_half>);
Case from_half_case("from_half", &convert<unsigned short, float, from_half>);
Case to_bfloat16_case("to_bfloat16", &convert<float, unsigned short, to_bfloat16>);
Case from_bfloat16_case("from_bfloat16", &convert<unsigned short, float, from_bfloat16>);

struct Params {
  const float* in;
  float* out;
  int size;
};

// Names as kernels write them: what they find is what is tested.
__device__ float rsqrt_of(float x) {
  return rsqrtf(x);
}
__device__ float exp2_of(float x) {
  return exp2f(x);
}
__device__ float exp_of(float x) {
  return expf(x);
}
__device__ float log_of(float x) {
  return logf(x);
}
__device__ float erf_of(float x) {
  return erff(x);
}
__device__ float tanh_of(float x) {
  return tanhf(x);
}
__device__ float fast_exp_of(float x) {
  return __expf(x);
}
__device__ float third_of(float x) {
  return __fdividef(x, 3.0f);
}
__device__ float exp2_approx_of(float x) {
  return exp2_approx(x);
}
__device__ float reciprocal_of(float x) {
  return reciprocal_approx(x);
}
__device__ float sqrt_of(float x) {
  return sqrtf(x);
}

template<float (*kFunction)(float)>
__global__ void apply(Params params) {
  int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < params.size) params.out[i] = kFunction(params.in[i]);
}

// FUNCTION PERTURB SEED
template<float (*kFunction)(float)>
void run(const Arguments& arguments) {
  host::set_perturb(arguments.at(0) == "1", std::stoull(arguments.at(1)));
  std::vector<float> in = read_all<float>(), out(in.size());
  unsigned blocks = unsigned(in.size() + 127) / 128;
  Params params{in.data(), out.data(), int(in.size())};
  require(launch(apply<kFunction>, blocks, 128, 0, nullptr, params));
  std::fwrite(out.data(), sizeof(float), out.size(), stdout);
}

Case rsqrt_case("rsqrtf", &run<rsqrt_of>);
Case exp2_case("exp2f", &run<exp2_of>);
Case exp_case("expf", &run<exp_of>);
Case log_case("logf", &run<log_of>);
Case erf_case("erff", &run<erf_of>);
Case tanh_case("tanhf", &run<tanh_of>);
Case fast_exp_case("__expf", &run<fast_exp_of>);
Case divide_case("__fdividef", &run<third_of>);
Case exp2_approx_case("exp2_approx", &run<exp2_approx_of>);
Case reciprocal_case("reciprocal_approx", &run<reciprocal_of>);
Case sqrt_case("sqrtf", &run<sqrt_of>);

}  // namespace
}  // namespace host_runtime_test
}  // namespace bertfast
