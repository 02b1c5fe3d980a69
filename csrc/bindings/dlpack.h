// What the bindings need of DLPack's C exchange interface: to look at a tensor without owning it.
//
// A tensor's class carries a capsule, `__dlpack_c_exchange_api__`, with a table of functions (torch
// has it from 2.10 on). The layouts are those of dlpack.h, major version 1, which may not change:
// https://github.com/dmlc/dlpack. Its functions that nothing here calls are plain pointers.
#pragma once

#include <cstdint>

namespace bertfast::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr char kAttribute[] = "__dlpack_c_exchange_api__";
constexpr char kCapsule[] = "dlpack_exchange_api";

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kBool = 6 };

struct Device {
  int32_t type;
  int32_t index;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

// The owner keeps the memory, the sizes and the strides, which count elements.
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct Header {
  uint32_t major;
  uint32_t minor;
  const Header* previous;  // the table of an older major version; null: none
};

struct ExchangeApi {
  Header header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*tensor_from_py_object_no_sync)(void* object, Tensor* out);  // may be null
  int (*current_work_stream)(DeviceType, int32_t index, void** out);
};

}  // namespace bertfast::dlpack
