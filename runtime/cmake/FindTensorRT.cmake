# Sets TensorRT_INCLUDE_DIRS and, where they can be linked, TensorRT_LIBRARIES: TensorRT and the CUDA runtime.
#
# Both are searched under CHAMELEON_TENSORRT_ROOT, in include/ and lib/, and then in the system's directories.
# CHAMELEON_CUDA_ROOT names another directory for CUDA, such as nvidia/cu13 of the wheels nvidia-cuda-runtime and
# nvidia-cuda-crt.

find_path(TensorRT_INCLUDE_DIR NvInferRuntime.h HINTS ${CHAMELEON_TENSORRT_ROOT} PATH_SUFFIXES include)
find_path(TensorRT_CUDA_INCLUDE_DIR cuda_runtime_api.h
          HINTS ${CHAMELEON_CUDA_ROOT} ${CHAMELEON_TENSORRT_ROOT} /usr/local/cuda PATH_SUFFIXES include)
find_library(TensorRT_LIBRARY nvinfer HINTS ${CHAMELEON_TENSORRT_ROOT} PATH_SUFFIXES lib)
find_library(TensorRT_CUDA_LIBRARY cudart
             HINTS ${CHAMELEON_CUDA_ROOT} ${CHAMELEON_TENSORRT_ROOT} /usr/local/cuda PATH_SUFFIXES lib lib64)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TensorRT REQUIRED_VARS TensorRT_INCLUDE_DIR TensorRT_CUDA_INCLUDE_DIR)
set(TensorRT_INCLUDE_DIRS ${TensorRT_INCLUDE_DIR} ${TensorRT_CUDA_INCLUDE_DIR})
set(TensorRT_LIBRARIES)
if(TensorRT_LIBRARY AND TensorRT_CUDA_LIBRARY)
  set(TensorRT_LIBRARIES ${TensorRT_LIBRARY} ${TensorRT_CUDA_LIBRARY})
endif()
