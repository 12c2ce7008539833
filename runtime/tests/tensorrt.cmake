# Configures the library with TensorRT's headers and compiles its decoder.
#   cmake -DSOURCE= -DBUILD= -DCXX= -DTENSORRT= -DCUDA= -DPYTHON= -P tensorrt.cmake
set(configure ${CMAKE_COMMAND} -S ${SOURCE} -B ${BUILD} -G Ninja -DCMAKE_CXX_COMPILER=${CXX} -DCHAMELEON_TESTS=OFF
    -DCHAMELEON_EXAMPLES=OFF -DCHAMELEON_TENSORRT_ROOT=${TENSORRT} -DCHAMELEON_CUDA_ROOT=${CUDA}
    -DPython3_EXECUTABLE=${PYTHON})
execute_process(COMMAND ${configure} COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${CMAKE_COMMAND} --build ${BUILD} --target chameleon_tensorrt COMMAND_ERROR_IS_FATAL ANY)
