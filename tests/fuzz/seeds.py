"""Where fuzzing begins: conversations as clients have them, and the words of the protocol.

Rules: bytes only. A seed is an input of `targets`.
"""

from __future__ import annotations

from typing import Final

from gdbstub.rsp import frame
from gdbstub.session import _TABLE

_SUPPORTED: Final = b"qSupported:multiprocess+;swbreak+;hwbreak+;error-message+;vContSupported+"

_CONVERSATIONS: Final = (
    b"""? g G p0 p10 P10=0000010000000000 P0=00 m10000,40 x20000,40 M20000,4:01020304 X20000,3:a}] mffffffff81000000,8
    Mffffffff81000000,1:90 qSearch:memory:20000;1000;guest qCRC:20000,1000 Qqemu.PhyMemMode:1 m0,10 qqemu.PhyMemMode
    Qqemu.sstep=0x5 qqemu.sstep qqemu.sstepbits qqemu.Supported qXfer:features:read:target.xml:0,ffb
    qXfer:memory-map:read::0,ffb qXfer:threads:read::0,ffb qXfer:exec-file:read:1:0,ffb qSymbol::""",
    b"""! ? Hgp1.1 Hc-1 T1 qC qfThreadInfo qsThreadInfo qThreadExtraInfo,1 qAttached QThreadEvents:1 vCont? vCont;s:p1.1
    | vCont;r10000,10006:p1.1;c | vCont;C05 | c10003 | s | S05;10001 | C05 | vRun; vKill;1 vAttach;1 R00 D;1 ? k""",
    b"""QNonStop:1 ? vStopped vCont;c:p1.-1 vCont;t:p1.-1 | vStopped vCtrlC vCont;s | vStopped QNonStop:0""",
    b"""Z0,10003,1 Z1,10004,1 vCont;c | z0,10003,1 Z2,20000,8 Z3,20010,4 Z4,fffffffffffffff8,8 c | z2,20000,8
    Z0,10001,1;X9,2210d1000a26000b27 Z0,10001,1;X3,220127;cmds:1,X10,34010007257825640a00220127 c |""",
    b"""QTinit QTDP:1:10001:E:0:0- QTDP:-1:10001:R03FFM-1,20000,8X3,220127 QTDPsrc:1:10001:at:0:1:61 QTDV:1:5:0:61
    QTBuffer:circular:1 QTBuffer:size:1000 QTro:10000,20000 QTNotes:user:61;notes:62 QTDisconnected:1 QTStart c | QTStop
    qTStatus QTFrame:0 g m20000,8 qXfer:traceframe-info:read::0,ff qTBuffer:0,100 QTFrame:pc:10001 QTFrame:range:0:ffff
    QTFrame:tdp:1 QTFrame:ffffffff qTP:1:10001 qTV:1 qTfP qTsP qTfV qTsV QTEnable:1:10001 QTDisable:1:10001""",
    b"""qHostInfo qProcessInfo qRegisterInfo0 qMemoryRegionInfo:10000 QThreadSuffixSupported p0;thread:1; g;thread:1;
    jThreadsInfo qThreadStopInfo1 qVAttachOrWaitSupported qGetWorkingDir vFile:setfs:0 vFile:open:2f766d6c696e7578,0,0
    vFile:fstat:0 vFile:pread:0,10,0 vFile:close:0 vFile:stat:2f vFile:readlink:2f""",
)
_COMMANDS: Final = (
    b"help",
    b"info registers",
    b"info mem",
    b"xp/4xw jiffies",
    b"symbols ji*",
    b"catch exception 14",
    b"kprobe add p:a busy_loop n=%di:u64",
    b"kretprobe add r:b busy_loop $retval",
    b"kprobe list",
    b"trace stream on",
    b"trace",
    b"snapshot save a",
    b"snapshot restore a",
    b"echo 'hist:keys=n' > events/kprobes/a/trigger",
    b"cat events/kprobes/a/hist",
    b"threads tasks",
    b"probe reset",
)


def conversations() -> list[bytes]:
    """Of the sessions: for either word size, a packet a line and an empty line where the guest's run ends."""
    asked = b"\n".join(b"qRcmd," + command.hex().encode() for command in _COMMANDS) + b"\nc\n\nqRcmd,7472616365"
    lines = [b"\n".join(b"" if word == b"|" else word for word in text.split()) for text in _CONVERSATIONS]
    return [kind + b"\n".join((_SUPPORTED, text)) for text in (*lines, asked) for kind in (b"\0", b"\x80")]


def commands() -> list[bytes]:
    """Of the monitor."""
    return [kind + b"\n".join(_COMMANDS).replace(b"\ntrace", b"\n\ntrace") for kind in (b"\0", b"\x80")]


def streams() -> list[bytes]:
    """Of the codec."""
    whole = [b"".join(frame(line, runs=False) + b"+" for line in text[1:].split(b"\n")) for text in conversations()]
    return [
        *whole,
        b"$g#67\x03$g#00-$g#67",
        b"%Stop:T05#00%a#61",
        b"$" + b"a" * 100 + b"#00$m0* ,4#00",
        b"\x03$a#\x0361",
    ]


def words() -> list[bytes]:
    """What an input may be put together from."""
    return [b"\n", b"\n\n", *(entry.declaration.name.encode() for entry in _TABLE), *_COMMANDS]
