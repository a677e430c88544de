#!/bin/sh
# The first process of the virtual machine of run.sh: runs the tests and says
# how they ended.
export PATH=/bin:/usr/bin:/usr/sbin HOME=/root TMPDIR=/tmp
if [ "$1" != again ]; then
	# The first root cannot be pivoted away from, which containers must do:
	# move to a tmpfs.
	mount -t proc proc /proc
	mkdir /new
	mount -t tmpfs -o mode=755,size=90% root /new
	for d in bin dev etc lib lib64 mnt proc root run sbin sys tests tmp usr var init; do
		[ ! -e /$d ] && [ ! -L /$d ] || [ $d = proc ] || cp -a /$d /new/
	done
	mkdir /new/proc
	umount /proc
	exec switch_root /new /init again
fi
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t tmpfs -o mode=755 run /run
mount -t cgroup2 -o nsdelegate cgroup2 /sys/fs/cgroup
ln -s /proc/self/fd /dev/fd
ip link set lo up
hostname v2
ulimit -n 65536
for m in overlay veth nf_tables nft_chain_nat nft_ct loop tcp_diag unix_diag udp_diag af_packet_diag netlink_diag inet_diag; do
	modprobe $m || echo "v2: no module $m"
done
# The tests' directories are on ext4, as images are in life: before Linux 6.3
# ownership cannot be mapped on tmpfs.
truncate -s 3G /run/disk
mkfs.ext4 -q -F -O ^has_journal -E root_owner=0:0 /run/disk && mount -t ext4 -o loop,discard /run/disk /tmp || echo "v2: no ext4 on /tmp"
chmod 1777 /tmp
# As an init system does it: all processes in a group of their own, so that the
# root group may give its controllers to its children.
mkdir /sys/fs/cgroup/init
echo $$ >/sys/fs/cgroup/init/cgroup.procs
for c in $(cat /sys/fs/cgroup/cgroup.controllers); do
	echo +$c >/sys/fs/cgroup/cgroup.subtree_control
done
echo "v2: controllers: $(cat /sys/fs/cgroup/cgroup.subtree_control)"
sed 's/^/v2: will run /' /tests/list
while read -r dir; do
	cd /tests/"$dir" || continue
	echo "v2: $dir"
	./test -test.v -test.timeout "$(cat /tests/timeout)" -test.count "$(cat /tests/count)" -test.run "$(cat /tests/run)" -test.skip "$(cat /tests/skip)" </dev/null 2>&1
	echo "v2: $dir: exit $?"
done </tests/list
echo "v2: over"
sync
reboot -f
