// Shuffles and votes, printed for every lane.
#include <cstdio>

#include "cases.h"

namespace bertfast {
namespace host_runtime_test {
namespace {

enum Call { kIndex, kUp, kDown, kXor };

struct ShuffleParams {
  double* out;
  Call call;
  int operand;
  int width;
};

// A value that needs all of T's bits, and that a double holds.
template<class T>
__device__ T value_of(int t) {
  return sizeof(T) == 8 ? T(t) * T(1099511627777) + T(7) : T(t * 3 + 7);
}

template<class T>
__global__ void shuffle(ShuffleParams params) {
  int t = int(threadIdx.x);
  T value = value_of<T>(t), result = 0;
  switch (params.call) {
    case kIndex:
      result = __shfl_sync(0xffffffffu, value, params.operand, params.width);
      break;
    case kUp:
      result = __shfl_up_sync(0xffffffffu, value, unsigned(params.operand), params.width);
      break;
    case kDown:
      result = __shfl_down_sync(0xffffffffu, value, unsigned(params.operand), params.width);
      break;
    case kXor:
      result = __shfl_xor_sync(0xffffffffu, value, params.operand, params.width);
      break;
  }
  params.out[t] = double(result);
}

template<class T>
void print_shuffles(const char* type) {
  for (Call call : {kIndex, kUp, kDown, kXor}) {
    for (int width : {1, 2, 8, 16, 32}) {
      for (int operand : {0, 1, 3, 5, 16, 31}) {
        double out[64];
        require(launch(shuffle<T>, 1, 64, 0, nullptr, ShuffleParams{out, call, operand, width}));
        std::printf("%s %d %d %d", type, int(call), width, operand);
        for (double value : out) std::printf(" %.0f", value);
        std::printf("\n");
      }
    }
  }
}

struct VoteParams {
  const int* predicate;
  unsigned* out;
};

__global__ void vote(VoteParams params) {
  int t = int(threadIdx.x), threads = int(blockDim.x);
  int predicate = params.predicate[t];
  params.out[t] = __ballot_sync(0xffffffffu, predicate);
  params.out[threads + t] = unsigned(__any_sync(0xffffffffu, predicate));
  params.out[2 * threads + t] = unsigned(__all_sync(0xffffffffu, predicate));
}

Case shuffles("shuffles", [](const Arguments&) {
  print_shuffles<int>("int");
  print_shuffles<unsigned>("unsigned");
  print_shuffles<float>("float");
  print_shuffles<long long>("long long");
  print_shuffles<double>("double");
});

// votes PREDICATE...: one a thread.
Case votes("votes", [](const Arguments& arguments) {
  std::vector<int> predicate;
  for (const std::string& argument : arguments) predicate.push_back(std::stoi(argument));
  std::vector<unsigned> out(3 * predicate.size());
  VoteParams params{predicate.data(), out.data()};
  require(launch(vote, 1, dim3(unsigned(predicate.size())), 0, nullptr, params));
  for (unsigned value : out) std::printf("%u ", value);
});

}  // namespace
}  // namespace host_runtime_test
}  // namespace bertfast
