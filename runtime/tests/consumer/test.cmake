# Install, then build and run the consumer against the installed tree only; once by find_package, once by pkg-config.
# cmake -DBUILD=... -DSOURCE=... -DBUNDLE=... -DCXX=... -DFLAGS=... -P test.cmake
set(work ${BUILD}/consumer)
file(REMOVE_RECURSE ${work})
function(run)
  execute_process(COMMAND ${ARGV} COMMAND_ERROR_IS_FATAL ANY COMMAND_ECHO STDOUT)
endfunction()
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${work}/prefix)
run(${CMAKE_COMMAND} -S ${SOURCE} -B ${work}/build -DCMAKE_PREFIX_PATH=${work}/prefix -DCMAKE_CXX_COMPILER=${CXX}
    -DCMAKE_CXX_FLAGS=${FLAGS})
run(${CMAKE_COMMAND} --build ${work}/build)
run(${work}/build/consumer ${BUNDLE})
run(${work}/prefix/bin/chameleon-run generate ${BUNDLE} --prompt Hello --json)

file(GLOB_RECURSE pc ${work}/prefix/*/chameleon.pc)
get_filename_component(pc_directory ${pc} DIRECTORY)
set(ENV{PKG_CONFIG_PATH} ${pc_directory})
execute_process(COMMAND pkg-config --define-variable=prefix=${work}/prefix --cflags --libs chameleon
                OUTPUT_VARIABLE pkg_flags OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
separate_arguments(pkg_flags UNIX_COMMAND "${FLAGS} ${SOURCE}/consumer.cpp ${pkg_flags} -o ${work}/by_pkg_config")
run(${CXX} ${pkg_flags})
run(${work}/by_pkg_config ${BUNDLE})
