package image

import (
	"strings"

	"cal/nucleus"
)

// generated are the files of /etc that are written for a machine. passwd and
// group are the image's own, whose users stay known by name; nil: none.
func generated(passwd, group []byte) map[string][]byte {
	return map[string][]byte{
		"/etc/passwd": []byte("root:x:0:0:root:/root:/bin/sh\n" +
			"agent:x:1000:1000:tools:" + nucleus.MachineHome + ":/bin/sh\n" +
			"coding-agent:x:1001:1001:agent:/:/usr/sbin/nologin\n" + others(passwd) +
			"nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"),
		"/etc/group": []byte("root:x:0:\nagent:x:1000:\ncoding-agent:x:1001:\n" + others(group) + "nogroup:x:65534:\n"),

		"/etc/hostname":      []byte("cal\n"),
		"/etc/hosts":         []byte("127.0.0.1 localhost cal\n::1 localhost\n"),
		"/etc/resolv.conf":   []byte("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n"),
		"/etc/nsswitch.conf": []byte("passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nservices: files\nprotocols: files\n"),
		"/etc/profile":       []byte("export PS1='$ '\n"),

		// git: the workspace belongs to whoever reads it.
		"/etc/gitconfig": []byte("[core]\n\tuntrackedCache = true\n[safe]\n\tdirectory = *\n[gc]\n\tauto = 0\n[advice]\n\tdetachedHead = false\n"),
	}
}

// others returns the lines of an image's own passwd or group whose names and ids
// do not clash with the machine's.
func others(table []byte) string {
	var kept strings.Builder
	for line := range strings.Lines(string(table)) {
		fields := strings.Split(strings.TrimSpace(line), ":")
		if len(fields) < 3 || ours[fields[0]] || ours[fields[2]] {
			continue
		}
		kept.WriteString(strings.TrimSpace(line) + "\n")
	}
	return kept.String()
}

var ours = map[string]bool{
	"root": true, "agent": true, "coding-agent": true, "nobody": true, "nogroup": true,
	"0": true, "1000": true, "1001": true, "65534": true,
}
