# Make the Debian package, unpack it elsewhere, and run its programs from there.
# cmake -DCPACK=... -DBUILD=... -DBUNDLE=... -P package.cmake
set(work ${BUILD}/package)
file(REMOVE_RECURSE ${work})
function(run)
  execute_process(COMMAND ${ARGV} COMMAND_ERROR_IS_FATAL ANY COMMAND_ECHO STDOUT)
endfunction()
run(${CPACK} -G DEB --config ${BUILD}/CPackConfig.cmake -B ${work})
file(GLOB package ${work}/chameleon-deploy_*.deb)
run(dpkg-deb --info ${package})
run(dpkg -x ${package} ${work}/root)
run(${work}/root/usr/bin/chameleon-run generate ${BUNDLE} --prompt Hello --json)

# It brings its own ONNX Runtime; everything else is a package that it names.
execute_process(COMMAND dpkg-deb --field ${package} Depends OUTPUT_VARIABLE depends COMMAND_ERROR_IS_FATAL ANY)
foreach(name libc6 libpcre2-8 libssl3 libutf8proc3)
  if(NOT depends MATCHES ${name})
    message(FATAL_ERROR "the package does not depend on ${name}: ${depends}")
  endif()
endforeach()
