package boot

import (
	"strings"
	"testing"
)

func TestCommandLine(t *testing.T) {
	got, err := parseCommandLine("console=ttyS0 quiet cal.disks=root,workspace,scratch panic=-1 cal.wire=serial cal.tasks=200\n")
	if err != nil || strings.Join(got.disks, " ") != "root workspace scratch" || got.wire != wireSerial || got.tasks != 200 {
		t.Errorf("%+v, %v", got, err)
	}
	for _, text := range []string{
		"", "cal.wire=serial", "cal.disks=root,workspace,scratch", "cal.disks=root,workspace,scratch cal.wire=tcp",
		"cal.disks=root,scratch cal.wire=serial", "cal.disks=root,root,workspace,scratch cal.wire=serial",
		"cal.disks=root,workspace,scratch,home cal.wire=vsock", "cal.disks=,root,workspace,scratch cal.wire=vsock",
		"cal.disks=root,workspace,scratch cal.wire=vsock cal.tasks=0", "cal.disks=root,workspace,scratch cal.wire=vsock cal.tasks=-1",
	} {
		if got, err := parseCommandLine(text); err == nil {
			t.Errorf("%q gives %+v", text, got)
		}
	}
}

func TestAssign(t *testing.T) {
	roles := []string{"root", "workspace", "scratch"}
	names := []string{"vda", "vdb", "vdc"}
	for _, test := range []struct {
		serials []string
		want    string // of root, workspace, scratch
	}{
		{[]string{"", "", ""}, "vda vdb vdc"},
		{[]string{"12-34", "12-35", "12-36"}, "vda vdb vdc"}, // Firecracker names the file
		{[]string{"scratch", "root", "workspace"}, "vdb vdc vda"},
		{[]string{"root", "root", "workspace"}, ""},
		{[]string{"root", "", "workspace"}, ""},
		{[]string{"root", "workspace", "layers"}, ""},
	} {
		disks, err := assign(names, test.serials, roles)
		got := ""
		if err == nil {
			got = disks["root"].name + " " + disks["workspace"].name + " " + disks["scratch"].name
		}
		if got != test.want {
			t.Errorf("serials %q: %q, %v, want %q", test.serials, got, err, test.want)
		}
	}
}

// sound is what a machine's kernel says of its mounts.
const sound = `
21 2 0:19 / / ro,nosuid,nodev,relatime - overlay overlay ro,lowerdir=/mnt/skeleton:/mnt/root
22 21 0:20 / /proc rw,nosuid,nodev,noexec,relatime - proc proc rw,hidepid=invisible
23 21 0:21 / /sys ro,nosuid,nodev,noexec,relatime - sysfs sysfs rw
24 21 0:22 / /dev ro,nosuid,noexec,relatime - tmpfs tmpfs ro,size=64k
25 24 0:23 / /dev/pts rw,nosuid,noexec,relatime - devpts devpts rw,gid=5,mode=620,ptmxmode=666
26 24 0:24 / /dev/shm rw,nosuid,nodev,noexec,relatime - tmpfs tmpfs rw,size=96036k
27 21 0:25 / /tmp rw,nosuid,nodev,relatime - tmpfs tmpfs rw,size=192072k
28 21 0:26 / /run rw,nosuid,nodev,noexec,relatime - tmpfs tmpfs rw,size=48020k
29 21 254:48 / /home/agent rw,nosuid,nodev,relatime - ext4 /dev/vdd rw
30 29 254:32 / /home/agent/workspace rw,nosuid,nodev,relatime - ext4 /dev/vdc rw
31 21 0:2 /init /.nucleus/nucleus-tool-proxy ro,nosuid,nodev - rootfs rootfs rw,size=233032k
32 21 254:16 /0 /opt/toolchains/go ro,nosuid,nodev,relatime - erofs /dev/vdb ro,user_xattr
`

// TestCheckMounts takes away one promise after the other.
func TestCheckMounts(t *testing.T) {
	text := strings.TrimPrefix(sound, "\n")
	if err := checkMounts(text); err != nil {
		t.Fatalf("what is sound: %v", err)
	}
	for name, spoil := range map[string][2]string{
		"root writable":            {"/ / ro,nosuid", "/ / rw,nosuid"},
		"root file system":         {"overlay ro,lower", "overlay rw,lower"},
		"root with an upper layer": {"lowerdir=/mnt/skeleton", "upperdir=/mnt/up,lowerdir=/mnt/skeleton"},
		"root of something else":   {"overlay overlay", "tmpfs overlay"},
		"setuid in the workspace":  {"workspace rw,nosuid,", "workspace rw,"},
		"devices in HOME":          {"/home/agent rw,nosuid,nodev", "/home/agent rw,nosuid"},
		"programs in /run":         {"/run rw,nosuid,nodev,noexec", "/run rw,nosuid,nodev"},
		"everybody's processes":    {",hidepid=invisible", ""},
		"/sys writable":            {"/sys ro", "/sys rw"},
		"/dev writable":            {"/dev ro", "/dev rw"},
		"proxy writable":           {"proxy ro", "proxy rw"},
		"layer writable":           {"go ro", "go rw"},
		"layer of another kind":    {"erofs /dev/vdb", "ext4 /dev/vdb"},
		"a mount too many":         {"31 21 ", "33 21 0:9 / /sys/kernel/debug rw,nosuid,nodev,noexec - debugfs debugfs rw\n31 21 "},
		"scratch on no disk":       {"ext4 /dev/vdd", "tmpfs tmpfs"},
		"a mount too few":          {" /dev/shm ", " /dev/sh "},
		"a line cut short":         {" - overlay overlay", ""},
	} {
		changed := strings.Replace(text, spoil[0], spoil[1], 1)
		if changed == text {
			t.Fatalf("%s: nothing to spoil", name)
		}
		if err := checkMounts(changed); err == nil {
			t.Errorf("%s: taken for sound", name)
		}
	}
}
