package audit
import ("testing";"path/filepath";"fmt";"os")
func TestZZFull(t *testing.T){
	for name, dir := range smallLogs(t) {
		n:=0
		for file, content := range contents(t, dir) {
			path := filepath.Join(dir, file)
			for i := range len(content) { for x:=1;x<256;x++ {
				changed := []byte(content); changed[i] ^= byte(x)
				os.WriteFile(path, changed, 0o600)
				detected(t, dir, fmt.Sprintf("%s byte %d of %s ^%d", name,i, file,x)); n++
			}}
			write(t, path, content)
		}
		t.Log(name,n)
	}
}
func TestZZFsck(t *testing.T){
	dir:="/tmp/x/fsck/live"; os.RemoveAll(dir); os.RemoveAll(dir+"-crashed")
	l:=mustOpen(t,dir,testOptions()); appendEntries(t,l,0,1000); l.Publish(); appendEntries(t,l,1000,77)
	copyDir(t,dir,dir+"-crashed")
	l2:=mustOpen(t,dir+"-crashed",testOptions()); t.Log(l2.Size()); l2.Close()
	os.WriteFile(dir+".pub",[]byte(testVerifier),0o600)
	// left open and unpublished on purpose
}
